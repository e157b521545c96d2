"""What an export's files declare about quantization: `config.json`, `hf_quant_config.json`.

Sources: NVIDIA/Model-Optimizer: modelopt/torch/export/convert_hf_config.py;
vllm-project/compressed-tensors: quantization/quant_config.py, quantization/quant_scheme.py.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nemotron.hf.names import DiskParameter
from nemotron.hf.quantized.assignment import Quantized, is_linear
from nemotron.hf.quantized.layouts import FORMAT_NAMES
from nemotron.hf.quantized.linear import layer_of
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.scales import StoredFormat

SIDECAR = "hf_quant_config.json"
Values = dict[str, Any]  # Any: JSON

PACKAGE = "nemotron-train"
CACHE: Values = {"dynamic": False, "num_bits": 8, "type": "float"}
MIXED = "MIXED_PRECISION"
PACKED: dict[StoredFormat, str] = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}
"""Names of the formats in compressed-tensors."""
HEAD = re.compile(r"(?P<root>backbone|mtp)\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")


def algorithm(format: StoredFormat, *, has_inputs: bool) -> str:
    """Return ModelOpt's name of a format; without input scales, inputs are not quantized."""
    return FORMAT_NAMES[format] if has_inputs or format == "fp8" else "W4A16_NVFP4"


def declare_modelopt(
    quantized: Quantized, parameters: Sequence[DiskParameter]
) -> tuple[Values, Values]:
    """Return `quantization_config` of `config.json`, and the content of `hf_quant_config.json`.

    One algorithm for the whole model names the layers that are left out; several name each layer
    that is quantized.
    """
    layers = {
        name: algorithm(scales.format, has_inputs=scales.input_scale is not None)
        for name, scales in quantized.layers.items()
    }
    entries = {name: _entry(algo) for name, algo in layers.items()}
    kinds = set(layers.values())
    cache, producer = "FP8" if quantized.cache_scales else None, _producer()
    excluded = _left_out(quantized, parameters)
    described: Values = {"quant_algo": MIXED, "kv_cache_quant_algo": cache}
    if len(kinds) == 1:
        described["quant_algo"] = kinds.pop()
        if described["quant_algo"] != "FP8":
            described["group_size"] = BLOCK
        described["exclude_modules"] = excluded
    else:
        # engines take NVFP4's fields from here also for a mix
        described |= {"group_size": BLOCK, "exclude_modules": [], "quantized_layers": entries}
    targets: dict[str, list[str]] = defaultdict(list)
    for name, algo in layers.items():
        targets[algo].append(name)
    whole = len(targets) == 1
    config: Values = {
        "config_groups": {
            f"group_{number}": _group(algo) | {"targets": ["Linear"] if whole else sorted(names)}
            for number, (algo, names) in enumerate(targets.items())
        },
        "ignore": described["exclude_modules"],
        "quant_algo": described["quant_algo"],
    }
    if not whole:
        config["quantized_layers"] = entries
    if cache is not None:
        config["kv_cache_scheme"] = CACHE
    config |= {"producer": producer, "quant_method": "modelopt"}
    return config, {"producer": producer, "quantization": described}


def declare_compressed(quantized: Quantized, parameters: Sequence[DiskParameter]) -> Values:
    """Return `quantization_config` of `config.json` in compressed-tensors' form.

    Layers are named by patterns, because readers call the trunk `backbone` or `model`.
    """
    groups: dict[tuple[StoredFormat, bool], list[str]] = defaultdict(list)
    for name, scales in quantized.layers.items():
        groups[scales.format, scales.input_scale is not None].append(name)
    formats = {PACKED[format] for format, _ in groups}
    config: Values = {
        "config_groups": {
            f"group_{number}": {
                "targets": patterns(names),
                "format": PACKED[format],
                **_scheme(format, has_inputs=has_inputs),
                "output_activations": None,
            }
            for number, ((format, has_inputs), names) in enumerate(groups.items())
        },
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": patterns(_left_out(quantized, parameters)),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    if quantized.cache_scales:
        config["kv_cache_scheme"] = CACHE | {"strategy": "tensor", "symmetric": True}
    return config


def patterns(layers: Sequence[str]) -> list[str]:
    """Return targets of compressed-tensors that match these layers and no others.

    Each pattern names what layers have in common, and their numbers. The experts of a layer are
    one pattern, which also matches the projection of a gate that vLLM asks for.
    """
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    found = []
    for name in layers:
        parts = HEAD.fullmatch(name)
        if parts is None:
            found.append(name)
            continue
        rest = re.escape(parts["rest"])
        if ".experts." in name:
            rest = r"mixer\.experts\.\d+\.\w+"
        own = numbers[parts["root"], rest]
        if parts["layer"] not in own[-1:]:
            own.append(parts["layer"])
    for (root, rest), own in numbers.items():
        start = "(backbone|model)" if root == "backbone" else root
        found.append(f"re:{start}\\.layers\\.({'|'.join(dict.fromkeys(own))})\\.{rest}$")
    return found


def _producer() -> Values:
    """Return the package that writes the files, and its version."""
    try:
        return {"name": PACKAGE, "version": version(PACKAGE)}
    except PackageNotFoundError:
        return {"name": PACKAGE, "version": "unknown"}


def _left_out(quantized: Quantized, parameters: Sequence[DiskParameter]) -> list[str]:
    """Return the layers with a matrix that stay as they are, with the router and convolutions."""
    kept = []
    for parameter in parameters:
        layer = layer_of(parameter.name)
        is_layer = is_linear(parameter) or layer.endswith((".gate", ".conv1d"))
        if is_layer and parameter.name.endswith(".weight") and layer not in quantized.layers:
            kept.append(layer)
    return kept


def _entry(algo: str) -> Values:
    return {"quant_algo": algo} | ({} if algo == "FP8" else {"group_size": BLOCK})


def _group(algo: str) -> Values:
    """Return ModelOpt's `config_groups` entry of an algorithm."""
    arguments: Values = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algo != "FP8":
        arguments |= {"num_bits": 4, "group_size": BLOCK}
    inputs = {} if algo.startswith("W4A16") else {"input_activations": arguments}
    return inputs | {"weights": dict(arguments)}


def _scheme(format: StoredFormat, *, has_inputs: bool) -> Values:
    """Return compressed-tensors' arguments of weights and inputs."""
    weights: Values = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    weights["dynamic"] = False
    if format == "nvfp4":
        weights |= {"num_bits": 4, "strategy": "tensor_group", "group_size": BLOCK}
        weights["scale_dtype"] = "torch.float8_e4m3fn"
    if not has_inputs:
        return {"weights": weights, "input_activations": None}
    # the blocks of NVFP4 inputs are scaled as they come; the scale of the tensor is fixed
    dynamic = "local" if format == "nvfp4" else False
    return {"weights": weights, "input_activations": weights | {"dynamic": dynamic}}
