"""Checkpoints of the old format are converted bit by bit, and nothing in them is executed."""

import collections
import contextlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException

from nemotron.checkpoint import pickled
from nemotron.checkpoint.convert import convert
from nemotron.checkpoint.find import locate, newest
from nemotron.checkpoint.manifest import folder_name
from nemotron.checkpoint.read import SavedTensors, read_model, read_model_config
from nemotron.checkpoint.write import dump_model_config
from nemotron.errors import UserError
from nemotron.model.config import ModelConfig
from tests.support.old_checkpoint import (
    OldReader,
    OldShardedTensor,
    load_old,
    plant_bytes,
    plant_object,
    plant_poison,
    seal,
    write_old,
)

CONFIG = ModelConfig(vocab_size=11, hidden_size=5, hybrid_override_pattern="M*E", n_groups=2)
MODEL = json.dumps(dump_model_config(CONFIG))

WHOLE = torch.randn(3, 7)

TENSORS = {
    "model.turned": torch.randn(3, 5).t(),
    "model.half": torch.randn(7).bfloat16(),
    "model.cut": OldShardedTensor(
        (3, 7), WHOLE.dtype, {(0, 0): WHOLE[:, :4], (0, 4): WHOLE[:, 4:]}
    ),
    "scale": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "byte": torch.arange(6, dtype=torch.uint8),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A run with a checkpoint of the old format."""
    write_old(tmp_path / "run" / "checkpoints", 10, TENSORS, MODEL)
    return tmp_path / "run"


def content_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    saved = SavedTensors(locate(checkpoint).info)
    tensors = saved.empty()
    saved.load(tensors)
    return tensors


def test_every_bit_survives_and_the_old_one_stays(old, capsys):
    before = (old / "checkpoints" / folder_name(10) / "__0_0.distcp").read_bytes()
    with pytest.raises(UserError, match=f"once with: nemotron checkpoint convert {old}"):
        newest(old / "checkpoints")
    assert convert(old, None) == 0
    assert "converted" in capsys.readouterr().out
    found = content_of(old)
    for name, tensor in (TENSORS | {"model.cut": WHOLE}).items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*bits)
    assert read_model_config(locate(old).info) == CONFIG
    kept = old / "checkpoints" / f"{folder_name(10)}.old-format"
    assert (kept / "__0_0.distcp").read_bytes() == before
    with pytest.raises(UserError, match="no checkpoint of the old format"):
        convert(old, None)


def test_a_converted_checkpoint_may_go_elsewhere(old, tmp_path):
    assert convert(old / "checkpoints" / folder_name(10), tmp_path / "new") == 0
    with pytest.raises(UserError, match="exists already; move it away"):
        convert(old / "checkpoints" / folder_name(10), tmp_path / "new")
    assert sorted(content_of(tmp_path / "new")) == sorted(TENSORS)
    assert [path.name for path in (old / "checkpoints").iterdir()] == [folder_name(10)]


def test_a_path_that_python_313_wrote_is_read(old):
    index = old / "checkpoints" / folder_name(10) / ".metadata"
    content = index.read_bytes()
    short, long = b"\x8c\x07pathlib", b"\x8c\x0epathlib._local"
    assert content.count(short) == 1
    # the frame before it grows with the name
    content = content.replace(short, long)
    start = 3
    length = int.from_bytes(content[start : start + 8], "little") + len(long) - len(short)
    index.write_bytes(content[:start] + length.to_bytes(8, "little") + content[start + 8 :])
    seal(index.parent, 10)
    assert convert(old, None) == 0


@pytest.mark.parametrize("plant", [plant_object, plant_bytes, plant_poison])
def test_nothing_that_is_planted_is_executed(old, tmp_path, plant, monkeypatch):
    target, mark = old / "checkpoints" / folder_name(10), tmp_path / "executed"
    plant(target, mark)
    before = sorted(path.name for path in target.parent.iterdir())
    for path in (old, target):
        with pytest.raises(UserError, match="nemotron checkpoint convert"):
            read_model(path)
    assert convert(old, None) == 1
    assert not mark.exists()
    assert sorted(path.name for path in target.parent.iterdir()) == before
    # the plant is a real one: torch's reader runs it, and that of the version before did
    into = {"model.half": torch.zeros(7, dtype=torch.bfloat16)}
    monkeypatch.setattr(torch.serialization._get_layout, "cache", {})
    with contextlib.suppress(CheckpointException):  # it is damaged as well
        load_old(target, into, OldReader if plant is plant_poison else dcp.FileSystemReader)
    assert mark.exists()


@pytest.mark.parametrize(
    ("find", "put", "words"),
    [
        (b"__0_0.distcp", b"../secret.dd", "not a file beside it"),
        (b"ChunkStorageMetadata", b"ChunkStorageMetadatX", "no checkpoint needs"),
        (b"float32", b"float99", "float99"),
        (b"pathlib", b"pathlob", "pathlob.PosixPath"),
    ],
)
def test_a_forged_index_is_refused_in_a_sentence(old, capsys, find, put, words):
    index = old / "checkpoints" / folder_name(10) / ".metadata"
    index.write_bytes(index.read_bytes().replace(find, put, 1))
    seal(index.parent, 10)
    assert convert(old, None) == 1
    assert words in capsys.readouterr().out
    assert [path.name for path in (old / "checkpoints").iterdir()] == [folder_name(10)]


def test_the_reader_of_pickles_needs_no_more_than_the_standard_library(old):
    folder = old / "checkpoints" / folder_name(10)
    command = [sys.executable, "-I", "-S", pickled.__file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tensors"].keys() == TENSORS.keys()


class LookedUp:
    """Is written as an attribute of something, which some releases of Python 3.11 do for enums."""

    def __init__(self, owner: object, name: str) -> None:
        self.looked_up = owner, name

    def __reduce__(self) -> tuple[object, ...]:
        return getattr, self.looked_up


def test_a_member_of_an_enumeration_that_python_3_11_2_wrote_is_read_and_no_other_attribute():
    member = LookedUp(metadata._MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")
    call = pickled.Machine().run(pickle.dumps(member))
    assert call.name.key == pickled.GETATTR
    assert call.arguments == (pickled.Name(*pickled.ENCODING), "TORCH_CONTIGUOUS_FORMAT")
    for owner, name in ((torch.Size, "numel"), (collections.OrderedDict, "fromkeys")):
        with pytest.raises(pickled.Refused, match="looks up an attribute"):
            pickled.Machine().run(pickle.dumps(LookedUp(owner, name)))
