"""The tutorials, from the first command to the last, with runs of a few steps."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import zstandard

from nemotron.cli import run
from nemotron.exit_codes import DONE
from tests.support.embedded import fill_cache
from tests.support.pages import ROOT, blocks

SHORT = "schedule: {total_steps: 3, warmup_steps: 1, decay_steps: 1}\n"
TINY = f"""
extends: whole-smoke.yaml
name: tiny
model: {{moe_latent_size: 32}}
{SHORT}
checkpoint: {{every_steps: 1, keep: 3}}
evaluation: {{tokens: 128}}
device: cpu
"""
SFT = f"""
extends: whole-sft.yaml
batch: {{global_tokens: 512, micro_batch: 1}}
{SHORT}
evaluation: {{tokens: 512}}
"""
RL = f"""
extends: whole-rl.yaml
rollout:
  num_prompts_per_step: 4
  num_generations_per_prompt: 2
  updates_per_step: 1
  max_new_tokens: 8
  slots: 8
  evaluation_tasks: 8
batch: {{global_tokens: 4096, micro_batch: 2}}
{SHORT}
checkpoint: {{every_steps: 2}}
evaluation: {{every_steps: 3}}
"""
SHORTER = {
    "evaluate --suite": ["--tasks", "1", "--max-new-tokens", "2"],
    "check-parity": ["--rows", "1", "--new-tokens", "2"],
    "generate": ["--max-new-tokens", "2"],
    "quantize": ["--rows", "1", "--no-check"],
    "train recipes/tiny/own.yaml": ["schedule.total_steps=3"],
    "data plan": ["schedule.total_steps=3"],
    "train recipes/nano/mine.yaml": [
        *("schedule.total_steps=2", "data.seq_len=64", "batch.global_tokens=128"),
        *("evaluation.tokens=64", "device=cpu"),
    ],
}
"""What a command gets in addition, by its first words."""
ELSEWHERE = {"serve", "chat", "lm-eval", "doctor"}
"""Commands that go on until they are stopped, need a package or look at the machine: other tests
run them."""


def shorten(recipe: Path, settings: str) -> None:
    """Put a recipe with these settings in the place of one, which it extends."""
    recipe.rename(recipe.with_name(f"whole-{recipe.name}"))
    recipe.write_text(settings)


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes, those that the tutorials train shortened to seconds."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    tiny = tmp_path / "recipes/tiny"
    shorten(tiny / "smoke.yaml", TINY.replace("name: tiny", "name: smoke"))
    (tiny / "pretrain.yaml").write_text(TINY)
    shorten(tiny / "assistant/pretrain.yaml", f"extends: whole-pretrain.yaml\n{SHORT}")
    shorten(tiny / "assistant/sft.yaml", SFT)
    shorten(tiny / "assistant/rl.yaml", RL)
    fill_cache(tmp_path / "runs/.cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipes(page: str, folder: Path) -> set[str]:
    """Write the recipes that a page shows, which begin with a comment that names the file."""
    written = set()
    for block in blocks("yaml"):
        first, _, text = block.text.partition("\n")
        if block.page.name == page and first.startswith("# recipes/"):
            (folder / first.removeprefix("# ")).write_text(text)
            written.add(first.removeprefix("# "))
    return written


def lines(page: str) -> list[list[str]]:
    """Return the commands of a page in order."""
    words = [
        shlex.split(line, comments=True)
        for block in blocks("sh")
        if block.page.name == page
        for line in block.text.splitlines()
    ]
    return [found for found in words if found]


def follow(page: str, instead: Mapping[str, str] | None = None) -> list[str]:
    """Run the commands of a page, with some words replaced; return the names of those that ran.

    The start script becomes one process for a recipe of the page; tests of `launch/` run it.
    """
    done, written = [], write_recipes(page, Path())
    instead = {
        "tiny/pretrain": "recipes/tiny/pretrain.yaml",
        "tiny/smoke": "recipes/tiny/smoke.yaml",
        **(instead or {}),
    }
    for program, *words in lines(page):
        own = [instead.get(word, word) for word in words]
        if program == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *own]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            done.append("torchrun")
        if program == "launch/torchrun.sh" and own[-1] in written:
            program, own = "nemotron", ["train", own[-1]]
        if program != "nemotron" or own[0] in ELSEWHERE:
            continue
        more = [
            extra
            for begin, found in SHORTER.items()
            if set(begin.split()) <= set(own)
            for extra in found
        ]
        assert run([*own, *more]) == DONE, own
        done.append(" ".join(own[:2]) if own[0] in ("data", "rl", "recipe") else own[0])
    return done


@pytest.mark.slow
@pytest.mark.nightly
def test_the_first_run(newcomer: Path):
    done = follow("first_run.md")
    assert {"train", "runs", "report", "evaluate", "compare", "generate", "export"} <= {*done}
    assert (newcomer / "runs/tiny/report.html").is_file()
    assert (newcomer / "exported/tiny/config.json").is_file()


@pytest.mark.slow
@pytest.mark.nightly
def test_quantize_and_serve(newcomer: Path):
    for name in ("mine", "assistant"):
        assert run(["train", "recipes/tiny/pretrain.yaml", f"name={name}"]) == DONE
    done = follow("ship.md")
    assert {"evaluate", "check-parity", "merge", "export", "quantize"} <= {*done}
    assert (newcomer / "small/merged/quantization.json").is_file()


@pytest.mark.slow
@pytest.mark.nightly
def test_own_data(newcomer: Path):
    words = (ROOT / "LICENSE").read_text().split()
    (newcomer / "texts").mkdir()
    (newcomer / "crawl").mkdir()
    rows = []
    for number in range(40):
        text = " ".join(words[number * 10 :][:300])
        (newcomer / f"texts/{number}.txt").write_text(text)
        rows.append(json.dumps({"text": text, "lang": "en" if number % 2 else "fr"}))
    packed = zstandard.ZstdCompressor().compress("\n".join(rows).encode())
    (newcomer / "crawl/a.jsonl.zst").write_bytes(packed)
    done = follow("own_data.md", {"8192": "320"})
    assert {"data inspect", "data prepare", "data tokenizer", "data plan", "train"} <= {*done}
    counts = json.loads((newcomer / "data/crawl/manifest.json").read_text())["counts"]
    assert (counts["documents"], counts["filtered"]) == (20, 20)
    status = json.loads((newcomer / "runs/own/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 3)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.distributed
def test_many_gpus(newcomer: Path, capsys: pytest.CaptureFixture[str]):
    done = follow("many_gpus.md")
    assert done.count("plan") == 2
    assert {"torchrun", "train", "compare"} <= {*done}
    assert run(["plan", "recipes/tiny/layout.yaml", "--gpus", "2"]) == DONE
    one, two = (
        [
            json.loads(line)
            for line in (newcomer / f"runs/{n}/metrics.jsonl").read_text().split("\n")
            if line
        ]
        for n in ("one", "two")
    )
    for left, right in zip(one, two, strict=True):
        if left["kind"] == "train":  # the page says: the same losses
            assert left["loss/total"] == pytest.approx(right["loss/total"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.nightly
def test_fine_tune_nano(newcomer: Path):
    assert run(["train", "recipes/tiny/pretrain.yaml", "name=small"]) == DONE
    assert run(["export", "runs/small", "--out", "released", "--no-check"]) == DONE
    (row,) = (b.text for b in blocks("json") if b.page.name == "fine_tune_nano.md")
    (newcomer / "chats.jsonl").write_text(row * 40)
    # a small model in the place of Nano
    (newcomer / "recipes/nano/model.yaml").write_text("extends: ../tiny/pretrain.yaml\n")
    done = follow("fine_tune_nano.md", {"nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "released"})
    assert {"import", "generate", "recipe show", "train", "report", "export"} <= {*done}
    assert (newcomer / "exported/nano-mine/config.json").is_file()
    assert (newcomer / "exported/nano-mine-adapter/adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.nightly
def test_reinforcement_learning(newcomer: Path):
    fewer = {"5000": "60", "4000": "60", "3000": "60"}
    done = follow("learn_from_rewards.md", fewer)
    assert done.count("train") == 3
    assert {"rl chats", "rl evaluate", "report", "rl reverify"} <= {*done}
    status = json.loads((newcomer / "runs/assistant-rl/status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 3)
