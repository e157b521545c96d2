"""`nemotron data tokenizer`: what it writes is trained with, and it replaces nothing foreign."""

import json
from pathlib import Path

import pytest
import tokenizers

from nemotron.cli import run
from nemotron.data.corpus import load_documents
from nemotron.data.tokenizer import load_tokenizer


@pytest.fixture
def text(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "verse.jsonl"
    rows = [json.dumps({"text": text}) for text in load_documents("verse")[:60]]
    path.write_text("\n".join([*rows, "{"]))
    return path


def learn(*words: str) -> int:
    return run(["data", "tokenizer", *words])


def test_a_run_trains_with_a_tokenizer_of_ones_own(text: Path, capfd):
    sizes = ["--vocab-size", "700", "--special", "<|mine|>"]
    assert learn("verse.jsonl", "--out", "own/tokenizer.json", *sizes) == 0
    said = capfd.readouterr().out
    assert "own/tokenizer.json: 700 tokens, from" in said
    assert "1 unreadable, such as verse.jsonl:61" in said
    settings = said.splitlines()[-1].removeprefix("use it as: ").split()
    assert settings == ["data.tokenizer=own/tokenizer.json", "model.vocab_size=768"]
    tokenizer = load_tokenizer("own")
    assert (tokenizer.id("</s>"), tokenizer.id("<|mine|>"), tokenizer.vocab_size) == (2, 32, 700)
    sentence = "Naïve ☕, To be or not\n  to be: 42"
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence
    short = ["device=cpu", "schedule.total_steps=4", "evaluation.tokens=64"]
    source = "data.sources=[verse.jsonl]"
    assert run(["train", "tiny/smoke", *settings, source, *short]) == 0
    saved = tokenizers.Tokenizer.from_file("runs/smoke/tokenizer.json")
    assert saved.get_vocab_size() == 700


def test_the_same_text_gives_the_same_file_and_a_sample_another(text: Path, capfd):
    for name in ("a", "b"):
        assert learn("verse.jsonl", "--out", name, "--vocab-size", "600") == 0
    assert Path("a").read_bytes() == Path("b").read_bytes()
    Path("little.txt").write_text("a b c " * 10)
    assert learn("little.txt", "--out", "c", "--vocab-size", "600") == 0
    assert "the text gives no more tokens; 600 were asked for" in capfd.readouterr().out


def test_nothing_foreign_is_replaced_and_mistakes_are_sentences(text: Path, capfd):
    assert learn("verse.jsonl", "--out", "a", "--vocab-size", "100") == 2
    assert "--vocab-size = 100 must be from 288" in capfd.readouterr().err
    Path("mine.txt").write_text("a diary")
    size = ["--vocab-size", "300"]
    assert learn("verse.jsonl", "--out", "mine.txt", *size) == 2
    assert learn("verse.jsonl", "--out", "mine.txt", *size, "--overwrite") == 2
    assert "mine.txt: is not a tokenizer.json, so it is not replaced" in capfd.readouterr().err
    assert Path("mine.txt").read_text() == "a diary"
    assert learn("verse.jsonl", "--out", "a", *size) == 0
    assert learn("verse.jsonl", "--out", "a", *size) == 2
    assert learn("verse.jsonl", "--out", "a", *size, "--overwrite") == 0
    Path("empty.txt").write_text("")
    assert learn("empty.txt", "--out", "e", *size) == 2
    assert "there is no text to learn from" in capfd.readouterr().err
    assert learn("verse.jsonl", "--out", ".", *size) == 2
    assert "is a folder; give the file" in capfd.readouterr().err
