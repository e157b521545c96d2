"""The commands from text to shards of pairs: demo, characters, noise, pairs."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemotron.cli import run
from nemotron.data.codeswitch.real import has_latin
from nemotron.data.correct.grammar import pinyin_of
from nemotron.data.correct.marks import marks_of
from nemotron.data.correct.pair import prompt_of
from nemotron.data.correct.pairs import PairRow, read_rows
from nemotron.data.folder import read_manifest
from nemotron.data.indexed import LEARNED, RIGHT, Shard, Stream
from nemotron.data.prepare import unit as unit_module
from nemotron.data.tokenizer import Tokenizer, load_tokenizer


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, pairs, tokenizer and shards of rows, made by the commands."""
    home = tmp_path_factory.mktemp("made")
    text, pairs, tokenizer = home / "text.jsonl", home / "pairs.jsonl", home / "tokenizer.json"
    for words in (
        ["demo", "grammar", "--out", str(home), "--number", "60"],
        ["noise", str(text), "--language", "grammar", "--out", str(pairs)],
        ["characters", str(text), str(pairs), "--out", str(tokenizer)],
        [
            *("pairs", str(pairs), "--tokenizer", str(tokenizer), "--hold-out", "0.2"),
            *("--out", str(home / "rows"), "--workers", "1"),
        ],
    ):
        assert run(["data", *words]) == 0
    return home


def rows_of(folder: Path) -> list[PairRow]:
    return [
        row
        for path in sorted(folder.glob("*.idx"))
        for row in read_rows(Shard(path.with_suffix("")))
    ]


def test_pairs_are_shown(made: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "inspect", str(made / "rows"), "--tokenizer", str(made / "tokenizer.json")]
    assert run([*words, "--check", "--rows", "1"]) == 0
    said = capsys.readouterr().out
    first, *_ = rows = rows_of(made / "rows")
    assert "pairs of 4 candidates to train on" in said
    assert "all files and all ids are correct" in said
    tokenizer = Tokenizer((made / "tokenizer.json").read_bytes())
    assert f"{tokenizer.decode(first.target.tolist())}  (target)" in said
    void = marks_of(tokenizer).void
    train = rows[: int(said.split(": ")[1].split(" ")[0])]
    tokens = sum((row.columns[0] != void).sum() for row in train)
    wrong = sum((~row.is_kept[0] & (row.columns[0] != void)).sum() for row in train)
    assert f"candidate 1: {wrong / tokens:.1%} of the tokens wrong" in said
    assert run([*words, "--plots", "p"]) == 2


def test_rows_give_back_the_pairs(made: Path):
    tokenizer = Tokenizer((made / "tokenizer.json").read_bytes())
    void = marks_of(tokenizer).void
    pairs = {pair["target"]: pair for pair in written(made / "pairs.jsonl")}
    rows = rows_of(made / "rows")
    assert len(rows) == len(pairs) == 60
    for row in rows:
        pair = pairs[tokenizer.decode(row.target.tolist())]
        lines = [tokenizer.decode(line[line != void].tolist()) for line in row.columns]
        assert lines == pair["candidates"]
        assert (row.durations.sum(axis=1) == len(row.target)).all()
        assert not row.durations[row.columns == void].any()
    manifest = read_manifest(made / "rows")
    assert manifest is not None
    assert manifest.options["pairs"] == {"form": "rows", "candidates": 4, "language": None}
    assert manifest.counts.held_out_documents > 0


def test_the_same_command_makes_the_same_bytes(made: Path, tmp_path: Path):
    again = tmp_path / "pairs.jsonl"
    words = [
        "data",
        "noise",
        str(made / "text.jsonl"),
        "--language",
        "grammar",
        "--out",
        str(again),
    ]
    assert run(words) == 0
    assert again.read_bytes() == (made / "pairs.jsonl").read_bytes()
    assert run([*words, "--overwrite", "--seed", "2"]) == 0
    assert again.read_bytes() != (made / "pairs.jsonl").read_bytes()


def test_a_stopped_command_goes_on_and_makes_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from nemotron.data.prepare import inputs

    monkeypatch.setattr(inputs, "SMALLEST_UNIT", 4000)  # several shards
    words = ["data", "pairs", str(made / "pairs.jsonl"), "--tokenizer", str(made), "--workers", "1"]
    assert run([*words, "--out", str(tmp_path / "whole")]) == 0
    original, calls = unit_module.PairEncoder.encode, []

    def stopping(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(*arguments, **keywords)

    monkeypatch.setattr(unit_module.PairEncoder, "encode", stopping)
    assert run([*words, "--out", str(tmp_path / "twice")]) == 130
    assert run([*words, "--out", str(tmp_path / "twice")]) == 0
    assert 60 < len(calls) < 90  # some rows were not read again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert len([name for name in names if name.endswith(".bin")]) > 2
    for name in names:
        if name.startswith((".", "m")):
            continue
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_right_tokens_of_chats_have_a_role_of_their_own(tmp_path: Path):
    rows = [
        {"target": "we go there now", "candidates": ["we go their now", "wee go there"]},
        {"target": "a b", "candidates": ["a b."]},
    ]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    words = ["data", "pairs", pairs, "--as", "chat", "--candidates", "2", "--hold-out", "0"]
    assert run([*words, "--out", str(tmp_path / "chat"), "--workers", "1"]) == 0
    [shard] = [Shard(path.with_suffix("")) for path in (tmp_path / "chat").glob("*.idx")]
    tokenizer = load_tokenizer("embedded")
    ids, roles = shard.document(0), shard.roles[: len(shard.document(0))]
    asked, answer = ids[roles != LEARNED], ids[roles == LEARNED]
    assert tokenizer.decode(answer.tolist()) == "we go there now<|im_end|>\n"
    assert prompt_of(rows[0]["candidates"]) in tokenizer.decode(asked.tolist())
    assert tokenizer.decode(ids[roles == RIGHT].tolist()) == "we go nowwe go"
    # the second "there" stands for two tokens, and "wee" for another
    # a reader of what is learned does not take a right source token for it
    assert Stream([shard]).read_learned(0, len(ids)).sum() == len(answer)


def test_a_blank_candidate_has_no_right_token(tmp_path: Path):
    pairs = write(tmp_path / "pairs.jsonl", [{"candidates": ["xyz", " "], "target": "we go there"}])
    words = ["data", "pairs", pairs, "--as", "chat", "--candidates", "2", "--hold-out", "0"]
    assert run([*words, "--out", str(tmp_path / "chat"), "--workers", "1"]) == 0
    [shard] = [Shard(path.with_suffix("")) for path in (tmp_path / "chat").glob("*.idx")]
    assert set(shard.roles.tolist()) == {0, LEARNED}


def test_pairs_are_not_taken_for_texts(made: Path, capsys: pytest.CaptureFixture[str]):
    words = [f"data.tokenizer={made / 'tokenizer.json'}", f"data.cache={made / 'cache'}"]
    words.append(f"data.sources=[{{name: pairs, path: {made / 'rows'}}}]")
    assert run(["data", "plan", "tiny/smoke", *words]) == 2
    assert "rows holds pairs; train on them with stage: correct, or" in capsys.readouterr().err


BAD = [
    ({"candidates": ["a"]}, "has no target"),
    ({"target": "", "candidates": ["a"]}, "has a target that is not text or is empty"),
    ({"target": "a", "candidates": []}, "has no list of candidates"),
    ({"target": "a", "candidates": "a"}, "has no list of candidates"),
    ({"target": "a", "candidates": ["a", 3]}, "has a candidate that is not text: candidates[1]"),
    ({"target": "a", "candidates": ["", ""]}, "has only empty candidates"),
    ({"target": "abc", "candidates": ["a b c"], "scores": [[0.1, 0.2]]}, "has 2 scores for"),
    ({"target": "abc", "candidates": ["a" * 2001]}, "has a text of 2,001 characters, at most"),
    ({"target": "a", "candidates": ["a"], "scores": [0.1]}, "not a list of numbers for each"),
    ({"target": "a", "candidates": ["a"], "scores": [["x"]]}, "has a score that is not a number"),
    (
        {"target": "a", "candidates": ["a"], "scores": [[10**400]]},
        "has a score that is not a number: 1000000000000000000000000000000000000000",
    ),
    ({"target": "a", "candidates": ["a"], "scores": [[], []]}, "of 2 candidates for 1"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_an_unfit_pair_is_named_and_too_many_stop(
    row: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pairs = write(tmp_path / "p.jsonl", [{"target": "a", "candidates": ["a", ""]}, row])
    words = ["data", "pairs", pairs, "--out", str(tmp_path / "out"), "--workers", "1"]
    words += ["--candidates", "2", "--hold-out", "0"]
    assert run([*words, "--max-bad-rows", "0"]) == 2
    answer = capsys.readouterr().err
    assert f"{pairs}:2 " in answer
    assert reason in answer
    assert not (tmp_path / "out").exists()
    assert run(words) == 0
    answer = capsys.readouterr()
    assert f"left out: {pairs}:2 " in answer.err
    assert reason in answer.err
    assert "1 unreadable" in answer.out
    assert len(rows_of(tmp_path / "out")) == 1


def test_candidates_are_repeated_or_cut_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [{"target": "aa", "candidates": list("bcd")}, {"target": "aa", "candidates": ["b"]}]
    pairs = write(tmp_path / "p.jsonl", rows)
    words = ["data", "pairs", pairs, "--out", str(tmp_path / "out"), "--workers", "1"]
    assert run([*words, "--candidates", "2", "--hold-out", "0"]) == 0
    answer = capsys.readouterr().out
    assert "too few candidates: 1 pairs" in answer
    assert "more candidates: 1 pairs" in answer
    tokenizer = load_tokenizer("embedded")
    found = [
        [tokenizer.decode(line.tolist()) for line in r.columns] for r in rows_of(tmp_path / "out")
    ]
    assert found == [["b", "c"], ["b", "b"]]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["pairs", "{text}", "--as", "row", "--out", "o"],
            "--as = row is unknown; use rows or chat.",
        ),
        (["noise", "{text}", "--language", "fr", "--out", "o"], "--language = fr is unknown; use"),
        (["noise", "{text}", "--language", "letters", "--out", "{text}"], "is an input"),
        (["demo", "german", "--out", "o"], "KIND = german is unknown; use grammar, en, yue."),
        (["characters", "{text}", "--vocab-size", "9", "--out", "o"], "must be from 33"),
        (["characters", "{text}", "--column", "a", "--out", "o"], "has no column a"),
        (["noise", "{bare}", "--language", "letters", "--out", "o"], "has no column text"),
        (["pairs", "{text}", "--tokenizer", "{other}", "--out", "o"], "has no token <mask>, nor"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    content = load_tokenizer("embedded").content.replace(b"<SPECIAL_18>", b"<SPECIAL_99>")
    (tmp_path / "other.json").write_bytes(content)
    write(tmp_path / "text.jsonl", [{"text": "a"}])
    write(tmp_path / "bare.jsonl", [{"other": "a"}])
    before = sorted(tmp_path.rglob("*"))
    names = {"{text}": "text.jsonl", "{bare}": "bare.jsonl", "{other}": "other.json"}
    assert run(["data", *[names.get(word, word) for word in words]]) == 2
    answer = capsys.readouterr().err
    assert sentence in answer
    assert answer.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_sounds_are_the_only_candidate(tmp_path: Path):
    source = tmp_path / "text.txt"
    source.write_text("我们去公园\n今天好\n", encoding="utf-8")
    words = ["data", "noise", str(source), "--language", "grammar", "--sounds"]
    assert run([*words, "--out", str(tmp_path / "s.jsonl")]) == 0
    found = written(tmp_path / "s.jsonl")
    assert [pair["candidates"] for pair in found] == [["wo men qu gong yuan"], ["jin tian hao"]]
    assert [pair["target"] for pair in found] == ["我们去公园", "今天好"]
    assert "".join(found[0]["candidates"][0].split()) == pinyin_of("我们去公园")


@pytest.mark.parametrize("kind", ["noise", "codeswitch"])
def test_half_a_character_is_left_out_and_gets_into_no_other_row(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    texts = [f"The river runs past stone {n}." for n in range(12)]
    rows = [{"text": text, "translation": text.upper()} for text in texts]
    rows[3]["text"] = " ".join(f"\ud800{n}" for n in range(200))  # of most of all words
    rows[5]["id"] = rows[5]["translation"] = "\udfff"
    source, out = tmp_path / "text.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", kind, str(source), "--out", str(out)]
    if kind == "noise":
        words += ["--language", "letters", "--rate", "1"]
    else:
        words += ["--languages", "xx,en", "--spf", "none", "--mode", "parallel"]
    assert run(words) == 0
    said = capsys.readouterr()
    assert f"{source}:4 has a text with a lone surrogate" in said.out + said.err
    assert f"{source}:6 h" in said.out + said.err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert "\ud800" not in json.dumps(found, ensure_ascii=False)
    assert found


@pytest.mark.parametrize(
    ("package", "language"), [("pycantonese", "yue"), ("pypinyin", "zh"), ("gruut_lang_en", "en")]
)
def test_a_missing_package_is_named_with_its_command(
    package: str,
    language: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    text = write(tmp_path / "text.jsonl", [{"text": "a"}])
    out = tmp_path / "o"
    assert run(["data", "noise", text, "--language", language, "--out", str(out)]) == 2
    assert f"needs the package {package}; install it: pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_cantonese_sentences_get_candidates_that_sound_alike(tmp_path: Path):
    pytest.importorskip("pycantonese")
    pytest.importorskip("rustling")
    assert run(["data", "demo", "yue", "--out", str(tmp_path), "--number", "30"]) == 0
    words = ["data", "noise", str(tmp_path / "text.jsonl"), "--language", "yue"]
    assert run([*words, "--out", str(tmp_path / "pairs.jsonl")]) == 0
    pairs = written(tmp_path / "pairs.jsonl")
    assert len(pairs) == 30
    assert not any(has_latin(pair["target"]) for pair in pairs)
    real = written(tmp_path / "mixed.jsonl")
    assert len(real) == 30
    assert all({"yue", "en"} <= set(row["languages"]) for row in real)
    assert real[0]["text"] == "".join(real[0]["words"])
    assert np.mean([pair["candidates"][0] != pair["target"] for pair in pairs]) > 0.3


def test_answers_are_scored_by_their_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pairs = write(
        tmp_path / "pairs.jsonl",
        [
            {"id": "1", "target": "a b", "candidates": ["a c", "a b"]},
            {"id": "2", "target": "d", "candidates": ["d"]},
        ],
    )
    rows = [{"id": "2", "answer": "d"}, {"id": "1", "answer": "a b"}]
    fixed = write(tmp_path / "fixed.jsonl", rows)
    assert run(["score", fixed, "--references", pairs, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["answer_wer"], found["source_wer"]) == (0, pytest.approx(1 / 3))
    assert run(["score", fixed, "--references", pairs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "first candidate             0.3333  0.2500  0.3333" in lines
    assert "sentences made better: 1, made worse: 0" in lines


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"id": "1", "answer": "a"}], "has no answer for 1 of 2 pairs"),
        ([{"id": "1", "answer": "a"}] * 2, "has the id 1, which an earlier row has"),
        ([{"id": n, "answer": "a"} for n in "123"], "has an answer to 3, which"),
        ([{"id": "1"}], "fixed.jsonl:1: has no answer"),
        ([{"id": "1", "answer": "a" * 20_001}], "has an answer of 20,001 characters; at most"),
    ],
)
def test_answers_that_do_not_fit_their_references_are_refused(
    rows: list[dict[str, Any]],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    pairs = [{"id": number, "target": "a", "candidates": ["b"]} for number in "12"]
    references = write(tmp_path / "pairs.jsonl", pairs)
    fixed = write(tmp_path / "fixed.jsonl", rows)
    assert run(["score", fixed, "--references", references]) == 2
    assert sentence in capsys.readouterr().err
