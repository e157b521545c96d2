"""Quantized exports in both layouts hold the emulated weights, and are read back to the bit."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.hf.export import export
from nemotron.hf.folder import read_folder
from nemotron.hf.names import disk_parameters
from nemotron.hf.quantized.assignment import Quantized
from nemotron.precision.scales import StoredFormat
from nemotron.precision.stored import fake_quantize_weight
from tests.support.cases import mostly_nightly
from tests.support.quantized import WIDTHS, scales_of_all

EXPERT = "backbone.layers.1.mixer.experts.2.up_proj"
MAMBA = "backbone.layers.0.mixer.in_proj"
KEYS = "backbone.layers.3.mixer.k_proj"
CACHE = {f"{KEYS}.k_scale": torch.tensor(0.25), KEYS[:-6] + "v_proj.v_scale": torch.tensor(0.5)}


def all_fp8(layer: str) -> StoredFormat | None:
    return "fp8" if re.search(r"(experts|in_proj|out_proj)", layer) and "mtp" not in layer else None


def all_nvfp4(layer: str) -> StoredFormat | None:
    return "nvfp4" if ".experts." in layer else None


def as_super(layer: str) -> StoredFormat | None:
    return "nvfp4" if ".experts." in layer else all_fp8(layer)


CHOICES = {"fp8": all_fp8, "nvfp4": all_nvfp4, "mixed": as_super}
LAYOUTS = ("modelopt", "compressed-tensors")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """A run whose layers have inputs that are multiples of 16."""
    return make_run(tmp_path_factory.mktemp("aligned") / "run", **WIDTHS)


@pytest.fixture(scope="module")
def weights(aligned: Path) -> dict[str, Tensor]:
    """Its weights by their names on disk."""
    config, masters = read_model(aligned)
    return {p.name: p.part_of(masters[p.source]) for p in disk_parameters(config)}


@pytest.fixture(scope="module")
def folders(
    aligned: Path, weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """An export of each choice in each layout, in several shards, unchecked."""
    home, found = tmp_path_factory.mktemp("quantized"), {}
    for layout in LAYOUTS:
        for name, choose in CHOICES.items():
            found[layout, name] = home / f"{layout}-{name}"
            quantized = Quantized(scales_of_all(weights, choose), CACHE, layout)
            out = found[layout, name]
            assert (
                export(aligned, out, quantized=quantized, check=False, max_shard_bytes=60_000) == 0
            )
    return found


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_back_equals_the_emulated_weights(
    aligned: Path, weights: dict[str, Tensor], folders: dict, layout: str, choice: str
):
    scales = scales_of_all(weights, CHOICES[choice])
    config, _ = read_model(aligned)
    loaded = read_folder(folders[layout, choice]).weights
    changed = 0
    for parameter in disk_parameters(config):
        master = weights[parameter.name]
        layer = parameter.name.removesuffix(".weight")
        expected = parameter.format.encode("x", master)["x"].float()
        if layer in scales:
            expected = fake_quantize_weight(master, scales[layer])
            changed += not torch.equal(expected, master)
            assert (expected - master).norm() < 0.2 * master.norm(), parameter.name
        assert torch.equal(parameter.part_of(loaded[parameter.source]), expected), parameter.name
    assert changed == len(scales) > 3


@pytest.mark.slow  # a process of its own for each layout
@pytest.mark.parametrize("layout", mostly_nightly(LAYOUTS, "modelopt"))
def test_the_check_of_an_export_covers_codes_and_scales(
    aligned: Path,
    weights: dict[str, Tensor],
    tmp_path: Path,
    layout: str,
    capfd: pytest.CaptureFixture,
):
    quantized = Quantized(scales_of_all(weights, as_super), CACHE, layout)
    assert export(aligned, tmp_path / "out", quantized=quantized) == 0
    said = capfd.readouterr().out
    assert "scales                 ok       " in said
    assert "skipped  transformers does not read FP8, NVFP4" in said, said
    assert said.count(" ok ") == 5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| layout | {layout} |" in card
    assert "| layers in NVFP4 | 18 (weights and inputs) |" in card
    assert "| cache of keys and values | FP8" in card
