"""Checkpoints are whole or absent, verified before they are read, and never run code."""

import json
import os
import pickle
import re
import tempfile
from pathlib import Path

import pytest
import torch

from nemotron.checkpoint.find import SAVING, Skipped, locate, newest
from nemotron.checkpoint.index import tiles
from nemotron.checkpoint.manifest import INDEX, MANIFEST, folder_name
from nemotron.checkpoint.read import SavedTensors, read_model, read_model_config, read_state
from nemotron.checkpoint.state import Counters, SavedState
from nemotron.checkpoint.write import CheckpointNotSaved, Content, save
from nemotron.errors import UserError
from nemotron.files import hash_file
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from tests.support import forked
from tests.support.old_checkpoint import Planted, plant_object, seal

CONFIG = ModelConfig(vocab_size=11, hidden_size=5, hybrid_override_pattern="M*E", n_groups=2)
SHARD = "rank-00000.safetensors"


def some_tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a.weight": torch.randn(3, 5, generator=generator),
        "model.b": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.exp_avg.a.weight": torch.randn(3, 5, generator=generator),
        "rng.cpu": generator.get_state(),
    }


def a_state(step: int) -> SavedState:
    counters = {"step": step, "tokens": 5 * step, "skipped_steps": 0, "nonfinite_in_a_row": 0}
    lists = {"recent_losses": [0.1], "recent_grad_norms": [1.0], "bad_steps": [], "passed_over": []}
    return SavedState(trainer=Counters(**counters, spikes_in_a_row=0, **lists), data={"lr": 0.1})


def fill(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(folder, Content(step, some_tensors(step), a_state(step), CONFIG), keep)


def rewrite_manifest(checkpoint: Path, name: str) -> None:
    """Let the manifest agree with what is now in the file, as a forger would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    path = checkpoint / name
    manifest["files"][name] = {"bytes": path.stat().st_size, "xxh128": hash_file(path)}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_saved_is_loaded_bit_for_bit(tmp_path):
    fill(tmp_path, 20)
    info = newest(tmp_path).info
    into = {name: torch.zeros_like(tensor) for name, tensor in some_tensors(20).items()}
    SavedTensors(info).load(into)
    for name, tensor in some_tensors(20).items():
        assert torch.equal(into[name], tensor), name
    assert read_state(info) == a_state(20)
    assert read_model_config(info) == CONFIG
    assert info.step == 20


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step-00000020"])
def test_the_model_is_read_from_a_run_its_checkpoints_or_one_of_them(tmp_path, place):
    for step in (10, 20):
        model = HybridLM(CONFIG)
        model.init_weights(step)
        whole = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        content = Content(step, whole, a_state(step), CONFIG)
        save(tmp_path / "checkpoints", content, 9)
    config, weights = read_model(tmp_path / place)
    assert config == CONFIG
    assert set(weights) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def flip_a_bit(checkpoint: Path) -> str:
    data = bytearray((checkpoint / SHARD).read_bytes())
    data[len(data) // 2] ^= 4
    (checkpoint / SHARD).write_bytes(data)
    return SHARD


def truncate_the_shard(checkpoint: Path) -> str:
    os.truncate(checkpoint / SHARD, 100)
    return f"{SHARD} has 100 bytes"


def remove_the_index(checkpoint: Path) -> str:
    (checkpoint / INDEX).unlink()
    return "index.json is missing"


def empty_the_index(checkpoint: Path) -> str:
    (checkpoint / INDEX).write_bytes(b"")
    return "index.json has 0 bytes"


def remove_the_manifest(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).unlink()
    return "did not finish"


def garble_the_manifest(checkpoint: Path) -> str:
    os.truncate(checkpoint / MANIFEST, 50)
    return "manifest.json: it is not valid JSON"


def change_the_state(checkpoint: Path) -> str:
    path = checkpoint / "state.json"
    path.write_text(path.read_text().replace("20", "21"))
    return "state.json"


def raise_the_format(checkpoint: Path) -> str:
    path = checkpoint / MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 7'))
    return "upgrade"


def point_outside(checkpoint: Path) -> str:
    path = checkpoint / MANIFEST
    path.write_text(path.read_text().replace('"state.json"', '"../state.json"'))
    return "not part of a checkpoint"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate_the_shard,
        remove_the_index,
        empty_the_index,
        remove_the_manifest,
        garble_the_manifest,
        change_the_state,
        raise_the_format,
        point_outside,
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_is_taken(tmp_path, damage):
    fill(tmp_path, 10, 20)
    words = damage(tmp_path / folder_name(20))
    found = newest(tmp_path)
    assert found.info.step == 10
    (skipped,) = found.skipped
    line = str(skipped)
    assert (skipped.step, skipped.damage is None) == (20, False)
    assert "step-00000020" in line
    assert words in line
    assert "\n" not in line


def test_a_half_written_newest_is_named(tmp_path):
    fill(tmp_path, 10)
    (tmp_path / f"{SAVING}step-00000020-0a1b2c3d").mkdir()
    found = newest(tmp_path)
    assert found.info.step == 10
    (skipped,) = found.skipped
    assert skipped == Skipped(20, None)
    assert str(skipped) == "step-00000020 is incomplete (the save was interrupted); skipped"


def test_with_only_damaged_checkpoints_the_user_is_told_why(tmp_path):
    fill(tmp_path, 10)
    flip_a_bit(tmp_path / folder_name(10))
    with pytest.raises(UserError, match=f"no complete checkpoint.*{SHARD}"):
        locate(tmp_path)
    with pytest.raises(UserError, match=f"damaged.*{SHARD}"):
        locate(tmp_path / folder_name(10))


@pytest.mark.parametrize("layout", [1, 2])
def test_a_planted_index_beside_good_tensors_is_refused_and_not_run(tmp_path, layout):
    fill(tmp_path, 10)
    checkpoint, mark = tmp_path / folder_name(10), tmp_path / "executed"
    plant_object(checkpoint, mark)
    seal(checkpoint, 10, layout)
    with pytest.raises(UserError, match=r"convert|'.metadata' is not part of a checkpoint"):
        read_model(tmp_path)
    assert not mark.exists()


def forge(checkpoint: Path, name: str, change) -> None:
    """Change a JSON file and let the manifest agree, as a forger would."""
    content = json.loads((checkpoint / name).read_text())
    change(content)
    (checkpoint / name).write_text(json.dumps(content))
    if name != MANIFEST:
        rewrite_manifest(checkpoint, name)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


A = "model.a.weight"

FORGERIES = {
    "outside": (INDEX, lambda c: piece(c).update(file="../secret"), r"pieces.0.file = '../secret'"),
    "unlisted": (INDEX, lambda c: piece(c).update(file="rank-00009.safetensors"), "rank-00009"),
    "device": (INDEX, lambda c: piece(c).update(file="/dev/zero"), "/dev/zero"),
    "beyond": (INDEX, lambda c: piece(c).update(offsets=[1, 0]), f"tensors.{A}.pieces do not"),
    "twice": (INDEX, lambda c: c["tensors"][A]["pieces"].append(piece(c)), "do not cover"),
    "hole": (INDEX, lambda c: c["tensors"][A]["pieces"].clear(), "do not cover"),
    "negative": (INDEX, lambda c: piece(c).update(shape=[-3, 5]), "shape.0 = -3"),
    "bomb": (INDEX, lambda c: enlarge(c, 1 << 40), "names tensors of"),
    "many dimensions": (INDEX, lambda c: c["tensors"][A].update(shape=[1] * 99), "shape"),
    "dtype": (INDEX, lambda c: c["tensors"][A].update(dtype="O"), "dtype = 'O'"),
    "other dtype": (INDEX, lambda c: c["tensors"][A].update(dtype="I32"), "has not the index's"),
    "key of an index": (INDEX, lambda c: c.update(code="x"), "index.json: code is an unknown key"),
    "model key": ("model.json", lambda c: c.update(code="x"), "model.json: code is an unknown key"),
    "model lacks": ("model.json", lambda c: c.pop("vocab_size"), "vocab_size is missing"),
    "model nests": ("model.json", lambda c: c.update(vocab_size=nested(90)), "vocab_size = a list"),
    "limit": ("model.json", lambda c: c.update(time_step_limit=["x", {}]), "time_step_limit must"),
}


def piece(content: dict) -> dict:
    return content["tensors"][A]["pieces"][0]


def enlarge(content: dict, rows: int) -> None:
    content["tensors"][A]["shape"][0] = piece(content)["shape"][0] = rows


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_record_with_good_hashes_is_refused_with_file_and_key(tmp_path, forgery):
    name, change, words = FORGERIES[forgery]
    fill(tmp_path, 10)
    forge(tmp_path / folder_name(10), name, change)
    with pytest.raises(UserError, match=f"step-00000010: is damaged: .*{words}") as error:
        read_model(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["trainer"].pop("step"), "trainer.step is missing"),
        (lambda c: c["trainer"].update(step=11), "trainer.step = 11 is not the step 10"),
        (lambda c: c["trainer"].update(speed=1), "trainer.speed is an unknown key"),
        (lambda c: c["trainer"].update(tokens="9"), "trainer.tokens = '9' must be"),
        (lambda c: c["trainer"].update(passed_over=[[1, 2]]), "trainer.passed_over.0"),
        (lambda c: c.update(trainer=nested(150)), "trainer"),
        (lambda c: c.update(data=nested(300)), "state.json: "),
    ],
)
def test_a_forged_state_is_refused_with_file_and_key(tmp_path, change, words):
    fill(tmp_path, 10)
    forge(tmp_path / folder_name(10), "state.json", change)
    with pytest.raises(UserError, match=f"state.json: .*{words}|{words}"):
        read_state(newest(tmp_path).info)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("step"), "manifest.json: step is missing"),
        (lambda c: c.update(step=11), "step = 11 is not that of step-00000010"),
        (lambda c: c.update(format="2"), "manifest.json: format = '2' must be"),
        (lambda c: c.update(files=nested(90)), "manifest.json: files = a list of 1 must be"),
        (lambda c: c["files"][SHARD].pop("xxh128"), "xxh128 is missing"),
        (lambda c: c["files"][SHARD].update(bytes=1e300), "bytes = 1e\\+300 must be"),
        (lambda c: c["files"].update({"\0": c["files"][SHARD]}), "not part of a checkpoint"),
        (lambda c: c["files"].pop(INDEX), "does not list index.json"),
        (lambda c: c.update(note="x"), "manifest.json: note is an unknown key"),
    ],
)
def test_a_forged_manifest_is_a_damaged_checkpoint(tmp_path, change, words):
    fill(tmp_path, 10)
    forge(tmp_path / folder_name(10), MANIFEST, change)
    [skipped] = newest(tmp_path).skipped
    assert re.search(words, str(skipped))


def test_a_link_or_a_pipe_is_no_file_of_a_checkpoint(tmp_path):
    fill(tmp_path / "a", 10)
    shard = tmp_path / "a" / folder_name(10) / SHARD
    shard.rename(tmp_path / SHARD)
    shard.symlink_to(tmp_path / SHARD)
    assert f"{SHARD} is not a regular file" in str(newest(tmp_path / "a").skipped[0])
    shard.unlink()
    os.mkfifo(shard)
    assert f"{SHARD} is not a regular file" in str(newest(tmp_path / "a").skipped[0])


def test_a_planted_object_in_a_tensor_file_is_refused_and_not_run(tmp_path):
    fill(tmp_path, 10)
    checkpoint, mark = tmp_path / folder_name(10), tmp_path / "executed"
    (checkpoint / SHARD).write_bytes(pickle.dumps(Planted(mark)).ljust(9000, b"\0"))
    rewrite_manifest(checkpoint, SHARD)
    with pytest.raises(UserError, match=f"damaged: {SHARD}: .*[Hh]eader"):
        read_model(tmp_path)
    assert not mark.exists()


def test_a_different_shape_or_dtype_is_named_and_nothing_is_cast(tmp_path):
    fill(tmp_path, 10)
    into = {
        "model.a.weight": torch.zeros(4, 5),
        "model.b": torch.zeros(7),
        "model.new": torch.zeros(2),
    }
    with pytest.raises(UserError) as error:
        SavedTensors(newest(tmp_path).info).load(into)
    text = str(error.value)
    assert "[3, 5] instead of [4, 5]" in text
    assert "torch.bfloat16 instead of torch.float32" in text
    assert "model.new is absent" in text


def test_only_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path):
    fill(tmp_path, 10, 20, 30)
    flip = tmp_path / folder_name(30) / SHARD
    os.truncate(flip, 5)
    fill(tmp_path, 40, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        folder_name(20),
        folder_name(30),
        folder_name(40),
    ]


def test_a_whole_checkpoint_is_never_overwritten_and_a_damaged_one_makes_room(tmp_path):
    fill(tmp_path, 10)
    with pytest.raises(CheckpointNotSaved, match="never overwritten"):
        fill(tmp_path, 10)
    flip_a_bit(tmp_path / folder_name(10))
    fill(tmp_path, 10)
    assert newest(tmp_path).info.step == 10
    assert (tmp_path / "step-00000010.damaged").is_dir()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from nemotron.checkpoint.state import Counters, SavedState
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import CheckpointNotSaved, Content, save
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
config = ModelConfig(vocab_size=11, hidden_size=5, hybrid_override_pattern="M", n_groups=2)
folder, tensors = Path(sys.argv[1]), {"model.a": torch.zeros(100, 1000)}
save(folder, Content(1, tensors, SavedState(), config), 2)
# writes past this size fail with an error of the file system, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
try:
    save(folder, Content(2, tensors, SavedState(), config), 2)
except CheckpointNotSaved as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_no_partial_one(tmp_path):
    folder = tmp_path / "checkpoints"
    done = forked.script(FULL_DISK, folder, output=tmp_path / "said.txt")
    assert done.wait() == 0, done.text
    assert "needs 400,000 bytes" in done.text
    assert "free" in done.text
    assert [path.name for path in folder.iterdir()] == [folder_name(1)]
    assert newest(folder).info.step == 1


def test_a_folder_that_cannot_be_made_is_an_answer_and_not_a_traceback(tmp_path):
    with pytest.raises(CheckpointNotSaved, match="gone"):
        fill(tmp_path / "vanished" / "checkpoints", 10)


PROTECTED = """
import os, sys
from pathlib import Path
import torch
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import Content, save
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
if os.geteuid() == 0:
    os.setuid(65534)  # root may remove anything
config = ModelConfig(vocab_size=11, hidden_size=5, hybrid_override_pattern="M", n_groups=2)
folder = Path(sys.argv[1])
for step in (1, 2, 3, 4):
    content = Content(step, {"model.a": torch.zeros(3)}, SavedState(), config)
    saved = save(folder, content, 2)
    print(*saved.notes, sep="\\n")
    if step == 1:
        (folder / "step-00000001").chmod(0o555)
        left = folder / ".nemotron-saving-step-00000009-01234567"
        left.mkdir()
        (left / "file").touch()
        left.chmod(0o555)
"""


def test_what_cannot_be_removed_is_named_and_saving_goes_on():
    with tempfile.TemporaryDirectory() as name:  # where another user may reach
        base = Path(name)
        base.chmod(0o755)
        folder = base / "checkpoints"
        folder.mkdir()
        folder.chmod(0o777)
        (folder / "step-00000007.old").mkdir()
        (folder / "step-00000007.tmp").mkdir()
        done = forked.script(PROTECTED, folder, output=base / "said.txt")
        assert done.wait() == 0, done.text
        said = done.text
        names = sorted(path.name for path in folder.iterdir())
    left = ".nemotron-saving-step-00000009-01234567"
    kept = ["step-00000007.old", "step-00000007.tmp"]
    assert names == [left, *(folder_name(step) for step in (1, 3, 4)), *kept]
    assert "step-00000001 is an older checkpoint, but it is read-only; it stays" in said
    assert f"{left} cannot be removed (Permission denied)" in said


def test_pieces_must_cover_a_shape_exactly_once():
    corner = [((0, 0), (2, 1)), ((2, 0), (1, 1)), ((0, 1), (1, 4)), ((1, 1), (2, 4))]
    assert tiles((3, 5), corner)
    assert not tiles((3, 5), corner[1:])
    assert not tiles((3, 5), [*corner, ((0, 0), (1, 1))])
    # as many elements as the whole, but one row twice and another not at all
    assert not tiles((3, 5), [((0, 0), (2, 5)), ((1, 0), (1, 5))])
    assert not tiles((3, 5), [((0, 0), (3, 4)), ((0, 5), (3, 1))])
    assert tiles((), [((), ())])
    assert not tiles((), [])
    assert tiles((0, 4), [])
