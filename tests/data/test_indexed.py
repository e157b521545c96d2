"""The shard format, against files written here with struct and files that Megatron wrote.

`golden/` holds what `IndexedDatasetBuilder` of megatron-core 0.16.1 made of `PLAIN` (uint16, one
sequence a document) and `SEQUENCES` (int32, several sequences a document).
"""

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.folder import open_tokens
from nemotron.data.indexed import HEADER, Shard
from nemotron.data.prepare.writer import ShardWriter, id_type
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError
from tests.support.prepared import write_prepared

MEGATRON = Path(__file__).parent / "golden"
PLAIN = [[5, 9, 2], [65001, 0, 7, 7, 2], [2], [*[300] * 11, 2]]
SEQUENCES = [[5, 9, 70000, 2], [1, 2, 3], [131071, 4, 2]]
PACK = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def write_raw(prefix: Path, documents: list[list[int]], code: int = 4) -> None:
    """Write a shard field by field, as the format's table says."""
    letter, size = PACK[code], struct.calcsize(PACK[code])
    flat = [token for document in documents for token in document]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(document)) for document in documents)
    offset = 0
    for document in documents:
        index += struct.pack("<q", offset)
        offset += len(document) * size
    index += b"".join(struct.pack("<q", number) for number in range(len(documents) + 1))
    Path(f"{prefix}.idx").write_bytes(index)


def read_documents(prefix: Path) -> list[list[int]]:
    shard = Shard(prefix)
    return [shard.document(i).tolist() for i in range(shard.num_documents)]


@pytest.mark.parametrize("code", PACK)
def test_every_id_type_is_read_and_written_byte_for_byte(tmp_path: Path, code: int):
    documents = [[3, 1, 4], [1], [], [5, 9, 2, 6, 100]]
    write_raw(tmp_path / "theirs", documents, code)
    assert read_documents(tmp_path / "theirs") == documents
    with ShardWriter(tmp_path / "ours", Shard(tmp_path / "theirs").dtype) as writer:
        for document in documents:
            writer.add(document)
    for end in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours.{end}", tmp_path / f"theirs.{end}"
        assert ours.read_bytes() == theirs.read_bytes()
    assert len(os.listdir(tmp_path)) == 4


def test_the_index_of_one_document_of_three_tokens_has_62_bytes(tmp_path: Path):
    with ShardWriter(tmp_path / "one", np.int32) as writer:
        writer.add([7, 8, 131071])
    index = (tmp_path / "one.idx").read_bytes()
    assert len(index) == 62
    assert index == b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 4, 1, 2, 3, 0, 0, 1)
    assert (tmp_path / "one.bin").read_bytes() == struct.pack("<iii", 7, 8, 131071)


@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=9), max_size=9))
def test_any_documents_come_back(tmp_path_factory, documents: list[list[int]]):
    prefix = tmp_path_factory.mktemp("shard") / "any"
    with ShardWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    assert read_documents(prefix) == documents
    assert Shard(prefix).num_tokens == sum(map(len, documents))


def test_megatrons_files_are_read_and_written_alike(tmp_path: Path):
    assert read_documents(MEGATRON / "plain") == PLAIN
    assert read_documents(MEGATRON / "sequences") == SEQUENCES
    with ShardWriter(tmp_path / "ours", id_type(65499)) as writer:
        for document in PLAIN:
            writer.add(document)
    for end in ("bin", "idx"):
        ours, theirs = tmp_path / f"ours.{end}", MEGATRON / f"plain.{end}"
        assert ours.read_bytes() == theirs.read_bytes()


def test_documents_of_several_sequences_are_written_as_megatron_writes_them(tmp_path: Path):
    theirs = Shard(MEGATRON / "sequences")
    with ShardWriter(tmp_path / "ours", theirs.dtype) as writer:
        for first, last in pairwise(theirs.documents.tolist()):
            for number in range(first, last):
                start = int(theirs.offsets[number]) // theirs.dtype.itemsize
                writer.extend(theirs.tokens[start : start + int(theirs.lengths[number])])
                writer.end_sequence()
            writer.end_document()
    assert theirs.num_sequences > theirs.num_documents
    for end in ("bin", "idx"):
        ours = tmp_path / f"ours.{end}"
        assert ours.read_bytes() == (MEGATRON / f"sequences.{end}").read_bytes()


INTERCHANGE = """
import json, sys
import numpy, torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder, cases = sys.argv[1], json.loads(open(sys.argv[1] + "/cases.json").read())
read = {}
for name, documents in cases.items():
    dtype = numpy.dtype(name)
    builder = IndexedDatasetBuilder(f"{folder}/theirs-{name}.bin", dtype=dtype.type)
    for document in documents:
        ids = torch.from_numpy(numpy.array(document, dtype=dtype).astype(numpy.int64))
        builder.add_document(ids, [len(document)])
    builder.finalize(f"{folder}/theirs-{name}.idx")
    ours = IndexedDataset(f"{folder}/ours-{name}")
    assert ours.index.dtype == dtype.type
    read[name] = [ours[i].tolist() for i in range(len(ours))]
    assert ours.document_indices.tolist() == list(range(len(documents) + 1))
json.dump(read, open(f"{folder}/read.json", "w"))
"""


@pytest.mark.slow
def test_megatron_reads_ours_and_we_read_megatrons_byte_for_byte(tmp_path: Path):
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed (pip install --no-deps megatron-core)")
    draw = np.random.default_rng(8)
    cases = {}
    for name in ("uint8", "int8", "int16", "int32", "int64", "uint16"):
        most = np.iinfo(name).max
        # empty ones, ordinary ones, the largest id, and one of a million tokens
        lengths = [*draw.integers(0, 40, 60).tolist(), 0, 1, 1_000_003 if name == "int32" else 999]
        cases[name] = [draw.integers(0, most, n, endpoint=True).tolist() for n in lengths]
        cases[name][3] = [most, 0, most]
        with ShardWriter(tmp_path / f"ours-{name}", name) as writer:
            for document in cases[name]:
                writer.add(np.array(document, dtype=np.int64))
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-W", "ignore", "-c", INTERCHANGE, str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads((tmp_path / "read.json").read_text()) == cases
    for name, documents in cases.items():
        for end in ("bin", "idx"):
            ours, theirs = (tmp_path / f"{who}-{name}.{end}" for who in ("ours", "theirs"))
            assert ours.read_bytes() == theirs.read_bytes(), (name, end)
        assert read_documents(tmp_path / f"theirs-{name}") == documents


def test_more_than_two_to_the_31_tokens_are_addressed_right(tmp_path: Path):
    # A file with a hole: 4.8 GB by its length, a few blocks on the disk.
    length, prefix = 1_200_000_000, tmp_path / "long"
    write_raw(prefix, [[], []], code=8)
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(34)
        file.write(struct.pack("<iiqq", length, length, 0, 2 * length))
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(4 * length)
        file.seek(2 * length)
        file.write(struct.pack("<H", 11))
        file.seek(4 * length - 4)
        file.write(struct.pack("<HH", 7, 2))
    shard = Shard(prefix)
    assert shard.num_tokens == 2_400_000_000 > 2**31
    assert shard.starts(slice(None)).tolist() == [0, length, 2 * length]
    assert shard.document(1)[[0, -2, -1]].tolist() == [11, 7, 2]


def test_ids_that_do_not_fit_are_refused_and_nothing_is_left(tmp_path: Path):
    with (
        pytest.raises(OverflowError, match="70000 do not fit uint16"),
        ShardWriter(tmp_path / "shard", np.uint16) as writer,
    ):
        writer.add([1, 70000])
    assert os.listdir(tmp_path) == []
    assert [id_type(size).itemsize for size in (4096, 65499, 65500, 131072)] == [2, 2, 4, 4]


def patch(prefix: Path, at: int, form: str, value: object) -> None:
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(at)
        file.write(struct.pack(form, value))


def cut(path: str, by: int) -> None:
    os.truncate(path, os.path.getsize(path) - by)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no idx": (
        lambda p: os.remove(f"{p}.idx"),
        r"s\.idx: does not exist, though s\.bin does; give",
    ),
    "no bin": (
        lambda p: os.remove(f"{p}.bin"),
        r"s\.bin: does not exist, though s\.idx does; give",
    ),
    "magic": (lambda p: patch(p, 0, "<9s", b"MMIDIDY"), r"s\.idx: .* does not begin with MMIDIDX"),
    "empty idx": (lambda p: os.truncate(f"{p}.idx", 0), r"s\.idx: .* does not begin with MMIDIDX"),
    "version": (lambda p: patch(p, 9, "<Q", 2), r"s\.idx: has version 2; only version 1"),
    "float ids": (
        lambda p: patch(p, 17, "B", 6),
        r"s\.idx: has id type code 6; .* 1, 2, 3, 4, 5, 8",
    ),
    "header": (
        lambda p: os.truncate(f"{p}.idx", 20),
        r"it has 20 bytes, but its header alone has 34",
    ),
    "idx cut": (lambda p: cut(f"{p}.idx", 8), r"s\.idx: has 94 bytes; with 3 .* must have 102"),
    "bin cut": (lambda p: cut(f"{p}.bin", 4), r"s\.bin: has 28 bytes; s\.idx says 32"),
    "bin longer": (lambda p: os.truncate(f"{p}.bin", 36), r"s\.bin: has 36 bytes; s\.idx says 32"),
    "no documents": (lambda p: patch(p, 26, "<Q", 0), r"s\.idx: has an empty document index"),
    "offset": (lambda p: patch(p, 54, "<q", 8), r"sequence 1 with 1 tokens starts at byte 8 .* 12"),
    "negative": (
        lambda p: patch(p, 34, "<i", -1),
        r"s\.idx: is damaged: sequence 0 with -1 tokens",
    ),
    "first": (lambda p: patch(p, 70, "<q", 1), r"span the sequences 1 to 3, .* there are 0 to 3"),
    "last": (lambda p: patch(p, 94, "<q", 4), r"span the sequences 0 to 4, .* there are 0 to 3"),
    "order": (lambda p: patch(p, 78, "<q", 3), r"s\.idx: is damaged: document 1 ends before it"),
    "huge count": (
        lambda p: patch(p, 18, "<Q", 2**60),
        r"s\.idx: has 102 bytes; with 1152921504606",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_shard_is_refused_in_one_sentence(tmp_path: Path, name: str):
    damage, sentence = BAD[name]
    write_raw(tmp_path / "s", [[3, 1, 4], [1], [5, 9, 2, 6]])
    assert Shard(tmp_path / "s").num_tokens == 8
    damage(tmp_path / "s")
    with pytest.raises(UserError, match=sentence) as refusal:
        Shard(tmp_path / "s").check()
    assert "\n" not in str(refusal.value)


def test_modes_of_a_file_of_several_modalities_are_allowed(tmp_path: Path):
    write_raw(tmp_path / "s", PLAIN)
    with open(tmp_path / "s.idx", "ab") as file:
        file.write(bytes(len(PLAIN)))
    assert read_documents(tmp_path / "s") == PLAIN


def test_a_missing_shard_is_named_as_resolved(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"{tmp_path}/none: does not exist, .* \(none\.bin and none\.idx\); give"
    ):
        Shard("none")


def test_a_shard_that_changes_under_way_is_named(tmp_path: Path):
    write_raw(tmp_path / "s", PLAIN)
    shard = Shard(tmp_path / "s")
    shard.check_unchanged()
    write_raw(tmp_path / "s", [*PLAIN, [1]])
    with pytest.raises(
        UserError, match=r"s\.bin: was changed while .*\(84 bytes when opened, 88 now"
    ):
        shard.check_unchanged()


@pytest.mark.parametrize("name", ["../away/train-00000", "/etc/train-00000", ".hidden"])
def test_a_manifest_names_files_inside_its_folder_only(tmp_path: Path, name: str):
    write_prepared(["Some text."], tmp_path / "away")
    folder = write_prepared(["Other text."], tmp_path / "folder")
    content = json.loads((folder / "manifest.json").read_text())
    content["train"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json: is not a manifest of prepared data"):
        open_tokens(folder, load_tokenizer("embedded"), "</s>", 4096)


def test_the_whole_index_of_a_prepared_folder_is_checked(tmp_path: Path):
    folder = write_prepared([f"Text {i}." for i in range(9)], tmp_path / "folder")
    index = bytearray((folder / "train-00000.idx").read_bytes())
    index[HEADER.size + 4 * 3] ^= 2  # the length of the fourth document, which no end looks at
    (folder / "train-00000.idx").write_bytes(index)
    with pytest.raises(UserError, match="is damaged: sequence 4 with"):
        open_tokens(folder, load_tokenizer("embedded"), "</s>", 4096)
