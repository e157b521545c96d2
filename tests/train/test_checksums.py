"""Damaged shards: their sizes are always compared, their content on request, by all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nemotron.cli import run
from nemotron.data.folder import open_tokens
from nemotron.data.indexed import Stream
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from nemotron.parallel.runtime import Ranks
from nemotron.run.folder import dump_recipe
from nemotron.train import checksums
from nemotron.train.checksums import verify_checksums
from nemotron.train.start import train
from tests.support.job import Job
from tests.support.pool import Pool
from tests.support.prepared import write_prepared

TEXTS = [f"The river {number} runs to the sea. " * (1 + number % 5) for number in range(200)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_prepared(TEXTS, tmp_path / "text", validation_fraction=0.2)


def flip(path: Path) -> None:
    """Change one bit in the middle of a file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def data(text: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    sources = [{"name": "text", "path": str(text)}]
    return {"sources": sources, "seq_len": 31, "cache": str(tmp_path / "cache"), **more}


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "train-00000.idx"])
def test_a_changed_bit_of_any_file_is_named_before_a_run_that_verifies(
    name, recipe, text, tmp_path
):
    config = recipe("bit", data=data(text, tmp_path, verify_checksums=True))
    flip(text / name)
    said = r"does not match its manifest; restore it" if name.endswith("bin") else "is damaged"
    with pytest.raises(UserError, match=said) as error:
        train(config)
    assert str(error.value).startswith(f"{text / name}: ")
    assert not config.run_path.exists()


def test_whole_data_is_verified_and_trained_and_by_default_it_is_not_read(
    recipe, text, tmp_path, caplog
):
    caplog.set_level("INFO")
    batch = {"global_tokens": 31 * 5, "micro_batch": 5}
    config = recipe("whole", batch=batch, data=data(text, tmp_path, verify_checksums=True))
    path = tmp_path / "whole.yaml"
    path.write_text(dump_recipe(config))
    assert run(["train", str(path), "--stop-at", "1"]) == 75
    assert "comparing 4 files, 0.0 GB, with their checksums" in caplog.text
    caplog.clear()
    flip(text / "train-00000.bin")
    resumed = ["train", str(path), "--resume", "--stop-at", "2"]
    assert run(resumed) == 2
    assert run([*resumed, "data.verify_checksums=false"]) == 75


@pytest.mark.parametrize("change", ["shorter", "longer", "removed"])
def test_a_file_of_another_size_is_always_named(change, text):
    roles = text / "train-00000.loss"  # nothing in the other files tells that there is one
    manifest = text / "manifest.json"
    content = manifest.read_text()
    facts = '"train-00000.loss": {"bytes": 9, "xxh128": "0"},'
    manifest.write_text(content.replace('"train-00000.bin": {', f'{facts} "train-00000.bin": {{'))
    if change != "removed":
        roles.write_bytes(b"\1" * (8 if change == "shorter" else 10))
    with pytest.raises(UserError) as error:
        open_tokens(text, load_tokenizer("embedded"), "</s>", 4096)
    found = {"shorter": "has 8 bytes", "longer": "has 10 bytes", "removed": "does not exist"}
    rule = "but manifest.json says 9 bytes; restore it or prepare the folder again."
    assert str(error.value) == f"{roles}: {found[change]}, {rule}"


def test_shards_without_a_manifest_are_named_as_not_compared(text, caplog):
    (text / "manifest.json").unlink()
    tokens = open_tokens(text, load_tokenizer("embedded"), "</s>", 4096)
    verify_checksums([tokens.train], Ranks())
    assert "2 shards have no manifest, and so no checksums, such as" in caplog.text


@pytest.mark.distributed
def test_a_damage_that_one_rank_finds_ends_all_with_its_sentence(on_two, text, tmp_path):
    flip(text / "validation-00000.bin")
    job = Job(on_two("damaged", data=data(text, tmp_path, verify_checksums=True)))
    assert job.wait() == [2, 2], job.text()
    for process in job.processes:
        said = " ".join(process.text.split())
        assert f"{text / 'validation-00000.bin'}: does not match its manifest" in said


def read_by(copies: list[str]) -> list[str]:
    """Verify the folder that is this rank's own; returns the files that it read."""
    rank, read = dist.get_rank(), []
    compare = checksums.check_content
    checksums.check_content = lambda path, facts: (read.append(path.name), compare(path, facts))
    try:
        opened = open_tokens(copies[rank], load_tokenizer("embedded"), "</s>", 4096)
        streams: list[Stream] = [opened.train, opened.validation]
        verify_checksums(streams, Ranks(rank, dist.get_world_size(), grouped=True))
    finally:
        checksums.check_content = compare
    return read


@pytest.mark.distributed
def test_ranks_share_the_files_that_they_see_alike_and_no_others(text, tmp_path):
    alone = write_prepared(TEXTS, tmp_path / "machine" / "text", validation_fraction=0.2)
    pool = Pool(3)
    try:
        first, second, third = pool.run(read_by, [str(text), str(text), str(alone)])
    finally:
        pool.close()
    every = {f"{side}-00000.{end}" for side in ("train", "validation") for end in ("bin", "idx")}
    assert {*first} | {*second} == every
    assert len(first) == len(second) == 2
    assert {*third} == every
