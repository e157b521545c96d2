"""The library of compressed-tensors reads our export in its layout, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.read import read_model
from nemotron.hf.export import export
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized
from nemotron.hf.shards import ShardedFolder
from nemotron.precision.stored import fake_quantize_weight
from tests.support.quantized import WIDTHS, scales_of_all

# pip install 'nemotron-train[readers]'
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name


def choose(layer: str) -> str | None:
    if ".experts." in layer:
        return "nvfp4"
    return "fp8" if layer.endswith(("in_proj", "shared_experts.up_proj")) else None


@pytest.mark.parametrize("inputs", [3.0, None])
def test_its_decompressor_gives_the_emulated_weights(
    make_run: Callable[..., Path], tmp_path: Path, inputs: float | None
):
    run = make_run(tmp_path / "run", **WIDTHS)
    config, masters = read_model(run)
    weights = {p.name: p.part_of(masters[p.source]) for p in disk_parameters(config)}
    scales = scales_of_all(weights, choose, inputs=inputs)
    quantized = Quantized(scales, layout="compressed-tensors")
    assert export(run, tmp_path / "out", quantized=quantized, check=False) == 0
    declared = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(declared)
    assert str(parsed.format) == "mixed-precision"
    stored, read = ShardedFolder(tmp_path / "out"), 0
    for name, master in weights.items():
        layer = name.removesuffix(".weight")
        if master.ndim != 2 or layer == name:
            continue
        matched = [
            scheme
            for scheme in parsed.config_groups.values()
            if any(match_name(layer, target) for target in scheme.targets)
        ]
        ignored = any(match_name(layer, target) for target in parsed.ignore)
        assert len(matched) == (layer in scales), layer
        if not matched:
            assert ignored or layer == "backbone.embeddings", layer
            continue
        assert not ignored, layer
        kind = BaseCompressor.get_value_from_registry(matched[0].format)
        own = {
            parameter: stored.read(f"{layer}.{parameter}")
            for parameter in kind.compression_param_names(matched[0])
        }
        given = kind.decompress(own, matched[0])["weight"]
        expected = fake_quantize_weight(master, scales[layer])
        assert torch.equal(given, expected.to(given.dtype)), layer
        assert (given.float() - master).norm() < 0.2 * master.norm(), layer
        read += given.dtype == torch.float32 or scales[layer].format == "nvfp4"
    assert read == len(scales) > 20


@pytest.mark.slow
def test_transformers_loads_a_model_without_experts(make_run: Callable[..., Path], tmp_path: Path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.disable_progress_bar()
    run = make_run(
        tmp_path / "run",
        **WIDTHS,
        hybrid_override_pattern="M*-M",
        num_nextn_predict_layers=0,
        mtp_hybrid_override_pattern=None,
    )
    config, masters = read_model(run)
    weights = {p.name: p.part_of(masters[p.source]) for p in disk_parameters(config)}
    scales = scales_of_all(
        weights,
        lambda layer: {
            "up_proj": "nvfp4",
            "down_proj": "nvfp4",
            "q_proj": "fp8",
            "k_proj": "fp8",
            "v_proj": "fp8",
            "in_proj": "fp8",
        }.get(layer.rpartition(".")[2]),
    )
    out = tmp_path / "out"
    quantized = Quantized(scales, layout="compressed-tensors")
    assert export(run, out, quantized=quantized, check=False) == 0
    theirs, found = transformers.NemotronHForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True, local_files_only=True
    )
    assert not any(found.values()), found
    with torch.no_grad():  # the first call decodes the weights
        assert theirs(input_ids=torch.arange(9).unsqueeze(0)).logits.isfinite().all()
    loaded = theirs.state_dict()
    for layer, own in scales.items():
        expected = fake_quantize_weight(weights[f"{layer}.weight"], own).bfloat16()
        if own.format == "fp8":  # transformers keeps FP8's scales in the model's dtype
            codes = ShardedFolder(out).read(f"{layer}.weight")
            expected = codes.bfloat16() * own.weight_scale.bfloat16()
        given = loaded[layer.replace("backbone.", "model.", 1) + ".weight"]
        assert torch.equal(given, expected), layer
