"""Rules by which engines read quantized folders, applied to every tensor of our exports.

The engines need GPUs. Each rule states the file that it is taken from:

- vllm: vllm-project/vllm: vllm/model_executor/layers/quantization/modelopt.py
- vllm models: vllm/model_executor/models/nemotron_h.py (names and fused layers)
- vllm ct: quantization/compressed_tensors/{compressed_tensors_moe/compressed_tensors_moe.py,
  schemes/compressed_tensors_w4a4_nvfp4.py, schemes/compressed_tensors_w8a8_fp8.py}
- trtllm: NVIDIA/TensorRT-LLM: tensorrt_llm/_torch/models/checkpoints/hf/nemotron_h_weight_mapper.py
- modelopt: NVIDIA/Model-Optimizer: modelopt/torch/export/{convert_hf_config.py,
  plugins/mcore_nemotron.py}
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.hf.export import export
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized
from nemotron.hf.shards import ShardedFolder, StoredTensor
from tests.support.quantized import WIDTHS, scales_of_all

FP8_TENSORS = {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"}
NVFP4_TENSORS = {
    "weight": "U8",
    "weight_scale": "F8_E4M3",
    "weight_scale_2": "F32",
    "input_scale": "F32",
}
CT_TENSORS = {
    "fp8": {"weight": "F8_E4M3", "weight_scale": "F32", "input_scale": "F32"},
    "nvfp4": {
        "weight_packed": "U8",
        "weight_scale": "F8_E4M3",
        "weight_global_scale": "F32",
        "input_global_scale": "F32",
    },
}
# modelopt: plugins/mcore_nemotron.py, names of a mixer's layers
LAYERS = re.compile(
    r"(backbone|mtp)\.layers\.\d+\.(mixer\.("
    r"in_proj|out_proj|q_proj|k_proj|v_proj|o_proj|up_proj|down_proj|gate|fc1_latent_proj"
    r"|fc2_latent_proj|experts\.\d+\.(up|down)_proj|shared_experts\.(up|down)_proj)|eh_proj)"
    r"|lm_head"
)
CACHE = {
    "backbone.layers.3.mixer.k_proj.k_scale": torch.tensor(0.25),
    "backbone.layers.3.mixer.v_proj.v_scale": torch.tensor(0.125),
}


def uniform_fp8(layer: str) -> str | None:
    return "fp8" if "mixer" in layer and not layer.startswith("mtp.") else None


def uniform_nvfp4(layer: str) -> str | None:
    return "nvfp4" if "experts" in layer or "in_proj" in layer else None


def mixed(layer: str) -> str | None:
    if ".experts." in layer:
        return "nvfp4"
    return "fp8" if layer.endswith(("in_proj", "out_proj", "q_proj", "k_proj", "v_proj")) else None


CHOICES: dict[str, Callable[[str], Any]] = {
    "FP8": uniform_fp8,
    "NVFP4": uniform_nvfp4,
    "MIXED_PRECISION": mixed,
}


@dataclass(frozen=True)
class Export:
    """A folder, and what it was asked to hold."""

    choose: Callable[[str], Any]
    config: dict[str, Any]
    sidecar: dict[str, Any]
    tensors: dict[str, StoredTensor]
    shapes: dict[str, tuple[int, ...]]
    """Shape of each matrix, by the name of its layer."""

    def own(self, layer: str) -> dict[str, StoredTensor]:
        start = f"{layer}."
        return {
            name.removeprefix(start): entry
            for name, entry in self.tensors.items()
            if name.startswith(start) and "." not in name.removeprefix(start)
        }


@pytest.fixture(scope="module")
def exports(
    make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Export]:
    home = tmp_path_factory.mktemp("engines")
    run = make_run(home / "run", **WIDTHS)
    config, masters = read_model(run)
    weights: dict[str, Tensor] = {
        p.name: p.part_of(masters[p.source]) for p in disk_parameters(config)
    }
    shapes = {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in weights.items()
        if name.endswith(".weight") and weight.ndim == 2 and "embeddings" not in name
    }
    found = {}
    for layout in ("modelopt", "compressed-tensors"):
        for name, choose in CHOICES.items():
            quantized = Quantized(scales_of_all(weights, choose_linear(choose)), CACHE, layout)
            out = home / f"{layout}-{name}"
            assert export(run, out, quantized=quantized, check=False) == 0
            beside = out / "hf_quant_config.json"
            assert beside.is_file() == (layout == "modelopt")
            found[layout, name] = Export(
                choose_linear(choose),
                json.loads((out / "config.json").read_text())["quantization_config"],
                json.loads(beside.read_text()) if beside.is_file() else {},
                ShardedFolder(out).tensors,
                shapes,
            )
    return found


def choose_linear(choose: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda layer: None if layer.endswith((".gate", "embeddings")) else choose(layer)


@pytest.mark.parametrize("algo", CHOICES)
def test_tensors_are_those_that_vllm_creates_for_each_layer(exports: dict, algo: str):
    """vllm: create_weights of ModelOptFp8LinearMethod and ModelOptNvFp4LinearMethod."""
    found, quantized = exports["modelopt", algo], 0
    for layer, (rows, columns) in found.shapes.items():
        assert LAYERS.fullmatch(layer), layer
        own = {k: v for k, v in found.own(layer).items() if k not in ("k_scale", "v_scale")}
        own.pop("e_score_correction_bias", None)
        format = found.choose(layer)
        if format is None:
            assert own == {"weight": own["weight"]}
            assert own["weight"].dtype in ("BF16", "F32")
            continue
        quantized += 1
        expected = FP8_TENSORS if format == "fp8" else NVFP4_TENSORS
        assert {key: entry.dtype for key, entry in own.items()} == expected
        shapes = {key: entry.shape for key, entry in own.items()}
        scalars = {key: () for key in expected if key.startswith(("input", "weight_scale"))}
        if format == "fp8":
            # trtllm: an expert's weight_scale with a dimension is taken for NVFP4's blocks
            assert shapes == scalars | {"weight": (rows, columns)}
        else:
            assert columns % 16 == 0  # vllm refuses others
            blocks = {"weight": (rows, columns // 2), "weight_scale": (rows, columns // 16)}
            assert shapes == scalars | blocks
    assert quantized > 10


@pytest.mark.parametrize("algo", CHOICES)
@pytest.mark.parametrize("form", ["config.json", "hf_quant_config.json"])
def test_vllm_finds_for_each_layer_the_method_that_reads_its_tensors(
    exports: dict, algo: str, form: str
):
    """vllm: is_layer_excluded, _resolve_quant_algo; vllm models: backbone -> model, qkv_proj."""
    found = exports["modelopt", algo]
    if form == "config.json":
        given, excluded = found.config, found.config["ignore"]
        assert given["quant_method"] == "modelopt"
        assert given["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    else:
        given = found.sidecar["quantization"]
        excluded = given["exclude_modules"]
        assert given["kv_cache_quant_algo"] == "FP8"
        if algo == "NVFP4":  # vllm: fields that NVFP4 must have
            assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= given.keys()
            assert given["group_size"] == 16
    assert given["quant_algo"] == algo
    excluded = [renamed(name) for name in excluded]
    layers = {renamed(k): v["quant_algo"] for k, v in given.get("quantized_layers", {}).items()}
    for layer in found.shapes:
        prefix = fused(renamed(layer))
        method = None
        if not is_excluded(prefix, excluded):
            method = resolve(prefix, layers) if algo == "MIXED_PRECISION" else algo
        expected = {None: None, "fp8": "FP8", "nvfp4": "NVFP4"}[found.choose(layer)]
        assert method == expected, layer


def renamed(name: str) -> str:
    return re.sub(r"^backbone\b", "model", name)


def fused(prefix: str) -> str:
    """Return the module that loads a layer: q, k and v as one, the experts of a layer as one."""
    prefix = re.sub(r"\.[qkv]_proj$", ".qkv_proj", prefix)
    return re.sub(r"(\.experts)\.\d+\.\w+$", r"\1", prefix)


def shards(prefix: str) -> list[str]:
    if prefix.endswith(".qkv_proj"):
        return [prefix.replace("qkv_proj", f"{part}_proj") for part in "qkv"]
    return [prefix]


def is_excluded(prefix: str, excluded: list[str]) -> bool:
    named = [shard in excluded for shard in shards(prefix)]
    assert len(set(named)) == 1, f"{prefix}: vllm wants all shards of a fused layer alike"
    if named[0]:
        return True
    # experts: excluded when those of the checkpoint are
    if prefix.endswith(".experts") and any(name.startswith(f"{prefix}.") for name in excluded):
        return True
    return any(name != prefix and name in prefix for name in excluded) or any(
        fnmatch(prefix, pattern) for pattern in excluded
    )


def resolve(prefix: str, layers: dict[str, str]) -> str | None:
    if prefix in layers:
        return layers[prefix]
    found = {layers[shard] for shard in shards(prefix) if shard in layers}
    assert len(found) <= 1
    if found:
        return found.pop()
    return next((algo for name, algo in layers.items() if name.startswith(f"{prefix}.")), None)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_cache_scales_have_names_that_vllm_gives_its_attention(exports: dict, layout: str):
    """vllm: model_loader/weight_utils.py: maybe_remap_kv_scale_name; one float32 number each."""
    tensors = exports[layout, "MIXED_PRECISION"].tensors
    names = {
        re.sub(r"\.mixer\.([kv])_proj\.\1_scale$", r".mixer.attn.\1_scale", name): entry
        for name, entry in tensors.items()
        if name.endswith(("k_scale", "v_scale"))
    }
    start = "backbone.layers.3.mixer.attn"
    assert names.keys() == {f"{start}.k_scale", f"{start}.v_scale"}
    scalar = () if layout == "modelopt" else (1,)
    assert {(entry.dtype, entry.shape) for entry in names.values()} == {("F32", scalar)}


@pytest.mark.parametrize("algo", CHOICES)
def test_config_groups_are_those_that_modelopt_converts_to(exports: dict, algo: str):
    """modelopt: convert_hf_config.py: Linear for one algorithm, names of layers for several."""
    found = exports["modelopt", algo]
    eight = {"dynamic": False, "num_bits": 8, "type": "float"}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    seen = set()
    for group in found.config["config_groups"].values():
        assert group["weights"] == group["input_activations"]
        assert group["weights"] in (eight, four)
        format = "fp8" if group["weights"] == eight else "nvfp4"
        if algo == "MIXED_PRECISION":
            assert group["targets"] == sorted(k for k in found.shapes if found.choose(k) == format)
        else:
            assert group["targets"] == ["Linear"]
        seen.add(format)
    assert seen == {"FP8": {"fp8"}, "NVFP4": {"nvfp4"}}.get(algo, {"fp8", "nvfp4"})
    if algo == "MIXED_PRECISION":
        assert found.config["quantized_layers"] == found.sidecar["quantization"]["quantized_layers"]


@pytest.mark.parametrize("algo", CHOICES)
def test_vllm_finds_one_scheme_for_each_layer_of_compressed_tensors(exports: dict, algo: str):
    """vllm ct: targets match names of either trunk; experts by names that it makes up."""
    found = exports["compressed-tensors", algo]
    assert found.config["quant_method"] == "compressed-tensors"
    for layer, (rows, columns) in found.shapes.items():
        format = found.choose(layer)
        names = [layer, renamed(layer)]
        if ".experts." in layer:
            base = re.sub(r"\.\d+\.\w+$", "", renamed(layer))
            names += [f"{base}.0.{proj}" for proj in ("gate_proj", "up_proj", "down_proj")]
        for name in names:
            schemes = [
                group
                for group in found.config["config_groups"].values()
                if any(matches(name, target) for target in group["targets"])
            ]
            ignored = any(matches(name, target) for target in found.config["ignore"])
            assert ignored == (format is None), name
            assert len(schemes) == (format is not None), name
        if format is None:
            continue
        (scheme,) = schemes
        packed = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized"}[format]
        assert scheme["format"] == packed
        own = {k: v for k, v in found.own(layer).items() if k not in ("k_scale", "v_scale")}
        assert {key: entry.dtype for key, entry in own.items()} == CT_TENSORS[format]
        if format == "nvfp4":
            # blocks of inputs are scaled as they come, from a fixed scale of the tensor
            assert scheme["input_activations"]["dynamic"] == "local"
            assert own["weight_packed"].shape == (rows, columns // 2)


def matches(name: str, target: str) -> bool:
    """Source: vllm-project/compressed-tensors: utils/match.py: match_name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name
