"""Made text that switches, as a source of a blend: what a model learns from it."""

import json
from pathlib import Path

import pytest

from nemotron.cli import run

RECIPES = Path(__file__).parents[3] / "recipes" / "correct"


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.nightly
def test_text_that_switches_is_learned_from_a_blend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    home = Path("data/yue")
    assert run(["data", "demo", "grammar", "--number", "1500", "--out", str(home)]) == 0
    assert run(["data", "demo", "en", "--number", "1000", "--out", "data/en"]) == 0
    sentences = texts_of(home / "text.jsonl")
    # some characters, and the words that begin with them, have a translation
    first = sorted({text[:2] for text in sentences})[:60]
    english = [f"{chr(97 + n // 8)}{chr(97 + n % 8)}xo" for n in range(60)]
    lexicon = "".join(f"{a}\t{b}\n" for a, b in zip(first, english, strict=True))
    Path("lexicon.tsv").write_text(lexicon, "utf-8")
    words = ["--lexicon", "lexicon.tsv", "--per-sentence", "1", "--spf", "none"]
    for name, part in (("cs", sentences[:1200]), ("mixed", sentences[1200:])):
        write(home / f"{name}_source.jsonl", part)
        source, out = str(home / f"{name}_source.jsonl"), str(home / f"{name}.jsonl")
        assert run(["data", "codeswitch", source, *words, "--out", out]) == 0
    write(home / "text.jsonl", sentences[:1200])
    files = [str(home / "text.jsonl"), str(home / "cs.jsonl"), "data/en/text.jsonl"]
    assert run(["data", "characters", *files, "--out", str(home / "tokenizer.json")]) == 0
    bits = {}
    for name in ("monolingual", "codeswitch"):
        small = [
            "model.vocab_size=640",
            "schedule.total_steps=24",
            "schedule.decay_steps=8",
            "schedule.warmup_steps=4",
        ]
        small += ["batch.global_tokens=1024", "batch.micro_batch=4", "evaluation.tokens=12288"]
        assert run(["train", str(RECIPES / f"{name}.yaml"), *small]) == 0
        lines = Path(f"runs/correct-{name}/metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        [bits[name]] = [
            row["validation/mixed/bits_per_byte"]
            for row in found
            if "validation/mixed/bits_per_byte" in row
        ][-1:]
    assert bits["codeswitch"] < 0.95 * bits["monolingual"]
