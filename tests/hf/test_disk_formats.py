"""A packed format beside the plain ones: it goes through export, the check and import."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemotron.checkpoint.read import read_model
from nemotron.errors import UserError
from nemotron.hf import selfcheck
from nemotron.hf.export import export
from nemotron.hf.folder import read_folder
from nemotron.hf.formats import BF16, F32, FORMATS, DiskTensor, Formats, Shape
from nemotron.hf.shards import INDEX, ShardedFolder
from nemotron.hf.source import open_checkpoint
from nemotron.model.init import STACKED
from nemotron.precision import nvfp4
from nemotron.precision.groups import Groups

CODES, BLOCKS, OUTER = "", "_scale", "_scale_2"


@dataclass(frozen=True)
class PackedNVFP4:
    """Two codes a byte, E4M3 scales of blocks of 16, and one float32 scale of the matrix."""

    name: str = "NVFP4"

    def tensors(self, name: str, shape: Shape) -> Sequence[DiskTensor]:
        if len(shape) != 2:
            return ()
        rows, columns = shape
        return (
            DiskTensor(name + CODES, (rows, -(-columns // 2)), torch.uint8),
            DiskTensor(name + BLOCKS, (rows, -(-columns // 16)), torch.float8_e4m3fn),
            DiskTensor(name + OUTER, (), torch.float32),
        )

    def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
        packed = nvfp4.quantize(master.bfloat16()).pack()
        scales = packed.scales
        blocks = scales.bytes.view(torch.float8_e4m3fn)
        outer = scales.amax.reshape(())
        return {name + CODES: packed.packed, name + BLOCKS: blocks, name + OUTER: outer}

    def decode(self, name: str, stored: Mapping[str, Tensor], shape: Shape) -> Tensor:
        bytes_, amax = stored[name + BLOCKS].view(torch.uint8), stored[name + OUTER].reshape(1)
        scales = nvfp4.Scales(bytes_, amax, Groups((shape[0],)), 1, nvfp4.BLOCK)
        return nvfp4.PackedNVFP4(stored[name + CODES], scales, shape[1]).unpack().dequantize()


NVFP4 = PackedNVFP4()
EXPERTS = (".up_proj.weight", ".down_proj.weight")  # also of shared experts and of the MLP
PACKED = Formats((("e_score_correction_bias", F32), *((end, NVFP4) for end in EXPERTS)), BF16)
READ = (*FORMATS, NVFP4)


def is_packed(source: str) -> bool:
    return source.endswith((*STACKED, *EXPERTS))


@pytest.fixture(scope="module")
def packed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose feed-forward matrices are packed, in several shards."""
    out = tmp_path_factory.mktemp("packed") / "out"
    assert export(run, out, formats=PACKED, check=False, max_shard_bytes=50_000) == 0
    return out


def test_what_is_read_back_is_the_fake_quantized_parameter(run: Path, packed: Path):
    _, masters = read_model(run)
    loaded = read_folder(packed, READ).weights
    assert loaded.keys() == masters.keys()
    assert sum(map(is_packed, masters)) == 14
    for name, master in masters.items():
        expected = master if name.endswith("e_score_correction_bias") else master.bfloat16().float()
        if is_packed(name):
            matrices = expected.unbind() if expected.ndim == 3 else [expected]
            parts = [nvfp4.quantize(matrix).dequantize() for matrix in matrices]
            expected = torch.stack(parts).view(master.shape)
            assert not torch.equal(expected, master.bfloat16().float()), name
        assert torch.equal(loaded[name], expected), name


def test_one_parameter_lies_there_as_three_tensors_of_one_file(packed: Path):
    stored = ShardedFolder(packed)
    name = "backbone.layers.1.mixer.experts.4.up_proj.weight"  # [9, 11]
    parts = {suffix: stored.tensors[name + suffix] for suffix in (CODES, BLOCKS, OUTER)}
    assert {k: (part.dtype, part.shape) for k, part in parts.items()} == {
        CODES: ("U8", (9, 6)),
        BLOCKS: ("F8_E4M3", (9, 1)),
        OUTER: ("F32", ()),
    }
    files = [stored.tensors[name + suffix].file for name in own_names(stored) for suffix in parts]
    assert all(len(set(files[first : first + 3])) == 1 for first in range(0, len(files), 3))
    assert len(set(files)) > 1


def own_names(stored: ShardedFolder) -> list[str]:
    return [name.removesuffix(OUTER) for name in stored.tensors if name.endswith(OUTER)]


def test_sizes_in_index_and_card_are_those_of_the_packed_tensors(packed: Path, exported: Path):
    index = json.loads((packed / INDEX).read_text())
    stored = ShardedFolder(packed)
    size = sum(stored.read(name).nbytes for name in stored.tensors)
    assert index["metadata"]["total_size"] == size
    assert index["weight_map"] == {name: entry.file for name, entry in stored.tensors.items()}
    assert size < json.loads((exported / INDEX).read_text())["metadata"]["total_size"]
    card = (packed / "README.md").read_text()
    assert "| stored as | BF16 (" in card
    assert ", NVFP4 (" in card


def test_the_check_compares_packed_values_with_the_checkpoint(
    run: Path, packed: Path, capsys: pytest.CaptureFixture
):
    assert selfcheck.main(packed, run, (PACKED,)) == 0
    out = capsys.readouterr().out
    assert out.count(" ok ") == 4
    assert "skipped  transformers does not read NVFP4" in out
    with pytest.raises(selfcheck.Failed, match="not as expected"):
        selfcheck.SelfCheck(packed, open_checkpoint(run)).check_schema()


def test_a_format_that_is_not_known_is_refused(packed: Path):
    with pytest.raises(UserError, match="is a packed NVFP4 or FP8 checkpoint"):
        read_folder(packed)


def test_a_packed_tensor_of_another_shape_is_named(run: Path, tmp_path: Path):
    @dataclass(frozen=True)
    class Narrow(PackedNVFP4):
        def encode(self, name: str, master: Tensor) -> dict[str, Tensor]:
            encoded = super().encode(name, master)
            return encoded | {name + BLOCKS: encoded[name + BLOCKS][:-1].clone()}

    narrow = Formats(tuple((end, Narrow()) for end in EXPERTS))
    assert export(run, tmp_path / "out", formats=narrow, check=False) == 0
    with pytest.raises(UserError, match=r"weight_scale has shape \[\d+, 1\] instead of"):
        read_folder(tmp_path / "out", READ)
