"""Reading rows: every kind of file, any cut, and what is wrong told with its place."""

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemotron.data.prepare import inputs, read
from nemotron.data.prepare.inputs import Piece, kind_of, open_parquet, plan
from nemotron.data.prepare.options import PrepareOptions, parse_filter
from nemotron.data.prepare.read import Bad, read_rows, read_text
from nemotron.errors import UserError

DRAW = random.Random(3)
ROWS = [{"text": "naïve ☕ " * DRAW.randint(0, 9), "score": i} for i in range(200)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
OPTIONS = PrepareOptions()


def read_all(sources: list[str], options: PrepareOptions = OPTIONS) -> list[dict]:
    """Read every row of every unit, and check that the progress ends at the whole size."""
    made, done = plan(sources, options), []
    rows = [
        row
        for unit in made.units
        for piece in unit.pieces
        for row in read_rows(piece, options, done.append)
    ]
    assert sum(done) == sum(unit.size for unit in made.units)
    assert not [row for row in rows if isinstance(row, Bad)]
    return [row for _, row in rows]


@pytest.mark.parametrize("target", [7, 100, 1000, 10**6])
def test_json_lines_may_be_cut_anywhere(tmp_path: Path, monkeypatch, target: int):
    (tmp_path / "a.jsonl").write_bytes(LINES.rstrip(b"\n"))
    monkeypatch.setattr(inputs, "SMALLEST_UNIT", target)
    monkeypatch.setattr(inputs, "MOST_UNITS", 10**9)
    assert read_all([str(tmp_path / "a.jsonl")]) == ROWS


def test_compressed_lines_and_parquet_hold_the_same_rows(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(LINES))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=33)
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        assert read_all([str(tmp_path / name)]) == ROWS
    texts = [{"text": row["text"]} for row in ROWS]
    assert read_all([str(tmp_path / "c.parquet")]) == texts
    filtered = PrepareOptions(filters=("score >= 0",))
    assert read_all([str(tmp_path / "c.parquet")], filtered) == ROWS
    assert len(read_all([str(tmp_path)])) == 600


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_bad_rows_are_told_with_their_line(tmp_path: Path, monkeypatch, ending: str):
    lines = LINES.splitlines(keepends=True)
    lines[3] = b'{"text": \n'
    lines[50] = b"\xff\xfe\n"
    lines[90] = b"[1, 2]\n"
    lines[91] = b"\n"
    lines[120] = b'{"text": "' + b"x" * 900 + b'"}\n'
    content = b"".join(lines)
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    monkeypatch.setattr(inputs, "SMALLEST_UNIT", 2000)
    options = PrepareOptions(max_row_bytes=500)
    found = [
        row
        for unit in plan([str(path)], options).units
        for piece in unit.pieces
        for row in read_rows(piece, options, lambda size: None)
    ]
    bad = [row for row in found if isinstance(row, Bad)]
    assert [row.where for row in bad] == [f"{path}:{n}" for n in (4, 51, 91, 121)]
    assert [row.why.split("(")[0].strip() for row in bad] == [
        "is not valid JSON",
        "is not UTF-8 text",
        "is a JSON list, with all rows in it, but not an object; each line is one row, {...}",
        "is longer than 500 bytes, the limit for a row",
    ]
    good = [row for i, row in enumerate(ROWS) if i not in (3, 50, 90, 91, 120)]
    assert [row[1] for row in found if not isinstance(row, Bad)] == good
    places = [row[0]() for row in found if not isinstance(row, Bad)]
    assert places[-1] == f"{path}:200"


def texts_of(path: Path, separator: str | None) -> list[str]:
    size = path.stat().st_size
    texts, open_text = [], ""
    for chunk in read_text(Piece("text", str(path), 0, size, size), separator, lambda n: None):
        assert not isinstance(chunk, Bad), chunk
        open_text += chunk.text
        if chunk.is_last:
            texts.append(open_text)
            open_text = ""
    assert not open_text
    return texts


@pytest.mark.parametrize("block", [1, 2, 5, 64, 10**6])
@pytest.mark.parametrize("separator", [None, "\n\n", "<|end|>"])
def test_text_is_split_at_separators_wherever_blocks_end(
    tmp_path: Path, monkeypatch, block: int, separator: str | None
):
    text = "ä first one\n\nsecond ☕☕<|end|>third\n\n\n<|en no end |> \n\nlast " + "long " * 40
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(read, "BLOCK", block)
    assert texts_of(tmp_path / "a.txt", separator) == (
        [text] if separator is None else text.split(separator)
    )


def test_a_text_that_is_no_utf_8_is_bad_and_says_where(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"fine \xff not")
    piece = Piece("text", str(tmp_path / "a.txt"), 0, 10, 10)
    [bad] = [c for c in read_text(piece, None, lambda n: None) if isinstance(c, Bad)]
    assert bad == Bad(f"{tmp_path}/a.txt near byte 5", "is not UTF-8 text")


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.compress(content[:3000]) + zstandard.compress(content[3000:]),
}


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_compressed_file_that_was_cut_is_refused_wherever_it_was(tmp_path: Path, ending: str):
    path = tmp_path / f"a.jsonl.{ending}"
    whole = COMPRESSORS[ending](LINES)
    path.write_bytes(whole)
    assert read_all([str(path)]) == ROWS
    boundary = len(zstandard.compress(LINES[:3000])) if ending == "zst" else 0
    for stop in (len(whole) // 3, len(whole) // 2, len(whole) - 1, boundary + 2):
        path.write_bytes(whole[:stop])
        with pytest.raises(UserError, match=f"a.jsonl.{ending}: is damaged: .*end"):
            read_all([str(path)])


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\x5a" * 40
    path.write_bytes(content)


def test_damaged_files_are_named(tmp_path: Path):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", row_group_size=100)
    group = pyarrow.parquet.ParquetFile(tmp_path / "c.parquet").metadata.row_group(1)
    damage(tmp_path / "c.parquet", group.column(0).data_page_offset)
    with pytest.raises(UserError, match=r"c\.parquet: row group 1 \(rows 100 on\) cannot be read"):
        read_all([str(tmp_path / "c.parquet")])
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(UserError, match=r"d\.parquet: is not a readable parquet file"):
        plan([str(tmp_path / "d.parquet")], OPTIONS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-300])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: is damaged"):
        read_all([str(tmp_path / "a.jsonl.gz")])


def test_sources_that_hold_nothing_are_refused(tmp_path: Path):
    (tmp_path / "a.bin").touch()
    for source, sentence in (
        ("nowhere/*.jsonl", "nowhere/.*does not exist; name files, folders or patterns"),
        (str(tmp_path), "contains no file to read"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan([source], OPTIONS)


def test_a_file_that_is_named_twice_is_refused(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Once.")
    with pytest.raises(UserError, match=r"a\.txt: is named twice; name each file once"):
        plan([str(tmp_path), str(tmp_path / "a*")], OPTIONS)


def test_kinds_are_told_by_the_ending_before_the_compression():
    names = ["a.jsonl", "b.JSONL.gz", "c.txt.zst", "d.parquet", "e.md", "f.tar"]
    kinds = ["jsonl", "jsonl", "text", "parquet", "text", None]
    assert [kind_of(name) for name in names] == kinds


@pytest.mark.parametrize(
    ("text", "row", "passes"),
    [
        ("score >= 0.5", {"score": 0.5}, True),
        ("score<0.5", {"score": 0.5}, False),
        ("lang == en", {"lang": "en"}, True),
        ('lang == "en"', {"lang": "en"}, True),
        ("lang != en", {"lang": "de"}, True),
        ("ok == true", {"ok": True}, True),
        (r"url ~ ^https?://", {"url": "http://x"}, True),
        ("score > 1", {"score": "many"}, False),
        ("score > 1", {}, False),
    ],
)
def test_filters_compare_a_column(text: str, row: dict, passes: bool):
    assert parse_filter(text).passes(row) is passes


@pytest.mark.parametrize("text", ["score", "score = 3", ">= 3", "url ~ ("])
def test_what_is_no_filter_is_refused(text: str):
    with pytest.raises(UserError, match="--filter"):
        parse_filter(text)


def test_a_column_whose_name_is_not_text_is_one_sentence(tmp_path: Path):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "lang": ["b"]}), path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"lang", b"\xff\xfeng"))
    with pytest.raises(UserError, match="is not a readable parquet file"):
        open_parquet(str(path))
