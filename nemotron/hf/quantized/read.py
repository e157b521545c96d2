"""Reading what a folder declares about its quantization, in either layout.

Sources: as `declare`; the files of NVIDIA's released Nano (one algorithm, layers left out) and
Super (several algorithms, each layer named) have these forms.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron.errors import UserError
from nemotron.hf.quantized.declaration import Declaration
from nemotron.hf.quantized.declare import MIXED, SIDECAR
from nemotron.hf.quantized.layouts import COMPRESSED_TENSORS, MODELOPT
from nemotron.hf.quantized.rules import Names, Rules, targets, wildcards
from nemotron.hf.shards import read_json
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import StoredFormat

CONFIG = "config.json"
KEY = "quantization_config"
Values = dict[str, Any]  # Any: whatever a JSON file holds

ALGORITHMS: dict[str, StoredFormat] = {
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
}
"""ModelOpt's names."""
SCHEMES: dict[tuple[object, ...], StoredFormat] = {
    (4, "float", "tensor_group", BLOCK): "nvfp4",
    (8, "float", "tensor", None): "fp8",
    (8, "float", "channel", None): "fp8",
}
"""compressed-tensors' arguments of weights: bits, type, strategy, group size."""
CACHES = (None, "FP8")


def read_declaration(folder: Path) -> Declaration | None:
    """Return what a folder declares; None where it declares no quantized layers.

    Raises:
        UserError: when it declares what cannot be read, or its files contradict each other.
    """
    where, beside = str(folder / CONFIG), folder / SIDECAR
    declared = read_json(folder / CONFIG).get(KEY)
    sidecar = _modelopt(read_json(beside), str(beside)) if _is_there(beside) else None
    if declared is None:
        return sidecar
    if not isinstance(declared, dict):
        raise UserError("must be a JSON object.", key=KEY, where=where)
    method = declared.get("quant_method")
    if method == "compressed-tensors":
        found = _compressed(declared, where)
    elif isinstance(method, str) and method.startswith("modelopt"):
        found = _modelopt(declared, where)
    else:
        rule = (
            "says that the weights are packed in a form that cannot be read, only modelopt and "
            "compressed-tensors can; use the bfloat16 checkpoint of this model."
        )
        raise UserError(rule, key=f"{KEY}.quant_method", value=method, where=where)
    if sidecar is not None and sidecar.rules != found.rules:
        raise UserError(f"{where} and {beside} declare different layers as quantized; remove one.")
    return found


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _modelopt(values: Values, where: str) -> Declaration:
    """Read ModelOpt's form: `hf_quant_config.json`, or `quantization_config` of `config.json`."""
    inner = values.get("quantization")
    legacy = isinstance(inner, dict)
    given = inner if isinstance(inner, dict) else values
    algo = str(given.get("quant_algo")).upper()
    ignored = _texts(given, "exclude_modules" if legacy else "ignore", where)
    if algo == MIXED:
        named = _layers(given, where)
        rules = Rules(named=named, ignored=wildcards(ignored))
    else:
        rules = Rules(whole=_algorithm(given, "quant_algo", where), ignored=wildcards(ignored))
    return Declaration(MODELOPT, rules, _has_cache(given, where), where)


def _layers(given: Values, where: str) -> dict[str, StoredFormat]:
    """Read the formats of single layers."""
    layers = given.get("quantized_layers")
    if not isinstance(layers, dict) or not layers:
        raise UserError(f"must name layers, as {MIXED} asks.", key="quantized_layers", where=where)
    found = {}
    for name, entry in layers.items():
        key = f"quantized_layers.{name}"
        if not isinstance(entry, dict):
            raise UserError("must be a JSON object.", key=key, where=where)
        found[name] = _algorithm(entry, "quant_algo", where, key)
    return found


def _algorithm(given: Values, key: str, where: str, prefix: str = "") -> StoredFormat:
    value, name = given.get(key), f"{prefix}.{key}" if prefix else key
    form = ALGORITHMS.get(str(value).upper())
    if form is None:
        known = (*ALGORITHMS, *(() if prefix else (MIXED,)))
        rule = f"cannot be read; known are {', '.join(known)}."
        raise UserError(rule, key=name, value=value, where=where)
    if form == "nvfp4" and given.get("group_size") not in (None, BLOCK):
        rule = f"is not supported; NVFP4 has blocks of {BLOCK}."
        size = given["group_size"]
        raise UserError(rule, key=name.replace(key, "group_size"), value=size, where=where)
    return form


def _has_cache(given: Values, where: str) -> bool:
    """Say whether keys and values are declared to be cached in FP8."""
    algo = given.get("kv_cache_quant_algo")
    if algo not in CACHES:
        rule = "cannot be read; known is FP8."
        raise UserError(rule, key="kv_cache_quant_algo", value=algo, where=where)
    scheme = given.get("kv_cache_scheme")
    if scheme is None:
        return algo is not None
    wanted = {"num_bits": 8, "type": "float", "dynamic": False}
    if not isinstance(scheme, dict) or any(scheme.get(k) != v for k, v in wanted.items()):
        rule = "cannot be read; known are 8 bits of type float that are not dynamic."
        raise UserError(rule, key="kv_cache_scheme", value=scheme, where=where)
    return True


def _compressed(given: Values, where: str) -> Declaration:
    """Read compressed-tensors' form."""
    for key in ("sparsity_config", "transform_config"):
        if given.get(key):
            rule = "is not supported; only quantized layers are."
            raise UserError(rule, key=f"{KEY}.{key}", where=where)
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError("must hold groups of layers.", key=f"{KEY}.config_groups", where=where)
    whole: StoredFormat | None = None
    found: list[tuple[Names, StoredFormat]] = []
    for name, group in groups.items():
        key = f"{KEY}.config_groups.{name}"
        if not isinstance(group, dict):
            raise UserError("must be a JSON object.", key=key, where=where)
        form, own = _scheme(group, key, where), _texts(group, "targets", where)
        if "Linear" in own:
            whole = form
        found.append((targets(target for target in own if target != "Linear"), form))
    ignored = targets(_texts(given, "ignore", where))
    rules = Rules(groups=tuple(found), whole=whole, ignored=ignored)
    return Declaration(COMPRESSED_TENSORS, rules, _has_cache(given, where), where)


def _scheme(group: Mapping[str, Any], key: str, where: str) -> StoredFormat:
    """Read the format of a group from the arguments of its weights."""
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise UserError("must be a JSON object.", key=f"{key}.weights", where=where)
    names = ("num_bits", "type", "strategy", "group_size")
    given = tuple(weights.get(name) for name in names)
    form = SCHEMES.get(given) if all(isinstance(v, int | str | None) for v in given) else None
    if form is None or weights.get("symmetric", True) is not True:
        rule = (
            f"cannot be read; known are FP8 for a tensor or channel, and NVFP4 in blocks of {BLOCK}"
        )
        raise UserError(f"{rule}.", key=f"{key}.weights", value=weights, where=where)
    return form


def _texts(given: Mapping[str, Any], key: str, where: str) -> list[str]:
    found = given.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError("must be a list of names.", key=key, where=where)
    return found
