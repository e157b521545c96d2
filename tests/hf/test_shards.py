"""Damaged and hostile folders of safetensors files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemotron.errors import UserError
from nemotron.hf.formats import RELEASED
from nemotron.hf.names import DiskParameter
from nemotron.hf.shards import INDEX, SINGLE, ShardedFolder, write_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, folder / FIRST)
    save_file({"b": torch.zeros(2, 5), "c": torch.zeros(4).bfloat16()}, folder / SECOND)
    rename(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    return folder


def rename(folder: Path, weight_map: dict) -> None:
    index = {"metadata": {"total_size": 60}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        ShardedFolder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tensors_are_found_over_files(folder: Path):
    stored = ShardedFolder(folder)
    assert stored.total_size == 60
    assert {name: (t.file, t.dtype, t.shape) for name, t in stored.tensors.items()} == {
        "a": (FIRST, "F32", (3,)),
        "b": (SECOND, "F32", (2, 5)),
        "c": (SECOND, "BF16", (4,)),
    }
    assert stored.read("a").tolist() == [1, 1, 1]


def test_a_single_file_needs_no_index(folder: Path):
    (folder / INDEX).unlink()
    (folder / FIRST).rename(folder / SINGLE)
    assert list(ShardedFolder(folder).tensors) == ["a"]


def test_shards_are_filled_up_to_their_limit_and_a_larger_tensor_has_one_of_its_own(tmp_path: Path):
    sizes = {"a": 3, "b": 4, "c": 5, "d": 1, "e": 30, "f": 2}
    parameters = [
        DiskParameter(n, (size,), n, None, RELEASED.of(n, (size,))) for n, size in sizes.items()
    ]
    read = lambda p: {p.name: torch.zeros(p.shape, dtype=torch.bfloat16)}  # noqa: E731
    assert write_shards(tmp_path, parameters, read, max_shard_bytes=2 * 12) == 2 * 45
    found: dict[str, str] = {}
    for name, stored in ShardedFolder(tmp_path).tensors.items():
        found[stored.file[6:11]] = found.get(stored.file[6:11], "") + name
    assert found == {"00001": "abc", "00002": "d", "00003": "e", "00004": "f"}


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


HOLE = b"""{"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            "c": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}}"""

DAMAGE: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
    "cut in the data": (lambda old: old[:-7], ["truncated", "instead of"]),
    "cut in the header": (lambda old: old[:40], ["truncated", "header"]),
    "longer than it says": (lambda old: old + b"\0", ["instead of"]),
    "empty": (lambda old: b"", ["is empty"]),
    "a page": (lambda old: b"<!DOCTYPE html><html>404</html>", ["HTML", "download"]),
    "a pointer": (lambda old: b"version https://git-lfs.github.com/spec/v1\noid", ["LFS"]),
    "other bytes": (lambda old: b"\xff" * 64, ["not a safetensors"]),
    "three bytes": (lambda old: b"abc", ["not a safetensors"]),
    "no JSON": (lambda old: header(b"{broken}"), ["header is damaged"]),
    "a list": (lambda old: header(b"[1]"), ["header is damaged"]),
    "no offsets": (lambda old: header(b'{"a": {"dtype": "F32"}}'), ["header is damaged"]),
    "a hole": (lambda old: header(HOLE) + b"\0" * 12, ["not a safetensors"]),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_named(folder: Path, damage: str):
    change, words = DAMAGE[damage]
    path = folder / SECOND
    path.write_bytes(change(path.read_bytes()))
    message = refusal(folder)
    assert all(word in message for word in [str(path), *words]), message


@pytest.mark.parametrize(
    "name",
    ["../model-00001-of-00001.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", 3, []],
)
def test_a_path_in_the_index_stays_inside_the_folder(folder: Path, name: object):
    rename(folder, {"a": FIRST, "b": name})
    message = refusal(folder)
    assert INDEX in message
    assert "not a plain file name" in message


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path):
    outside = tmp_path / "outside.safetensors"
    (folder / FIRST).rename(outside)
    (folder / FIRST).symlink_to(outside)
    assert "leads out of the folder" in refusal(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path):
    repository = tmp_path / "models--someone--model"
    folder = write(repository / "snapshots" / "abc123")
    (repository / "blobs").mkdir()
    (folder / FIRST).rename(repository / "blobs" / "f00")
    (folder / FIRST).symlink_to("../../blobs/f00")
    assert set(ShardedFolder(folder).tensors) == {"a", "b", "c"}


def test_a_missing_file_is_named(folder: Path):
    (folder / SECOND).unlink()
    assert f"{folder / SECOND}: is missing" in refusal(folder)


def test_a_tensor_that_is_not_where_the_index_says_is_named(folder: Path):
    rename(folder, {"a": FIRST, "b": FIRST, "c": SECOND})
    assert f"b is not in {FIRST}" in refusal(folder)


def test_a_tensor_in_two_files_is_named(folder: Path):
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, folder / FIRST)
    assert "b is in" in refusal(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(folder: Path, content: str):
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(folder)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path):
    message = refusal(tmp_path)
    assert INDEX in message
    assert SINGLE in message
