"""The page of a run that was really trained: its figures, its damage, and hostile text in it."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.drawing.scale import short
from nemotron.posttrain.environments.base import Response, Verdict
from nemotron.posttrain.rollout import Rollout
from nemotron.posttrain.tasks import Task
from nemotron.report.page import render
from nemotron.report.run import read_run
from nemotron.run.metrics import read_metrics
from tests.support.markup import Markup

Copy = Callable[..., Path]

EVIL = "</title><script>alert('x')</script>\"' onload=\"alert(1)\" <img src=x onerror=alert(2)>"
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "h2",
    "h3",
    "p",
    "i",
    "span",
    "nav",
    "a",
    "div",
    "dl",
    "dt",
    "dd",
    "small",
    "table",
    "tr",
    "th",
    "td",
    "code",
    "details",
    "summary",
    "pre",
    "figure",
    "figcaption",
    "svg",
    "text",
    "path",
    "ul",
    "li",
    "b",
    "em",
    "footer",
    "wbr",
    "br",
}


def page_of(folder: Path, *more: str) -> Markup:
    """Write the report of a run as a user does, and read it."""
    assert run(["report", str(folder), *more]) == 0
    return Markup((folder / "report.html").read_text())


def test_a_report_says_what_the_run_logged(copy: Copy, capsys: pytest.CaptureFixture[str]):
    folder = copy()
    page = page_of(folder)
    assert re.fullmatch(r"\S+/mine/report.html: [\d,]+ bytes\n", capsys.readouterr().out)
    records = read_metrics(folder / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    last = train[-1]
    for label, key in (
        ("training", "loss/main"),
        ("depth 2", "loss/mtp_2"),
        ("balance", "loss/aux"),
        ("learning rate", "lr"),
        ("mamba", "grad_norm/mamba"),
        ("forward_backward", "perf/forward_backward_s"),
        ("rss", "mem/rss_gib"),
        ("verse", "data/tokens/verse"),
    ):
        assert f"{label} {short(float(last[key] or 0))}" in page.text
    validation = [r for r in records if r["kind"] == "validation"]
    best = min(validation, key=lambda r: float(r["validation/loss"] or 0))
    assert f"best validation loss {best['validation/loss']:.4f} at step {best['step']}" in page.text
    assert f"bits per byte, code {validation[-1]['validation/code/bits_per_byte']:.4f}" in page.text
    assert "Extends tiny/smoke , and sets other values" in page.text
    assert "schedule.total_steps 6 9" in page.text
    assert 'precision.compute not set "bf16"' in page.text
    assert "8 other precision: preset mxfp8 from here on" in page.text
    assert "5 skip skipped the update: loss or gradient is not finite" in page.text
    assert "6 resume resumed at" in page.text
    assert "Load of every expert at step 9" in page.text
    assert "Router bias of every expert at step 9" in page.text
    assert "Relative error of quantized operands" in page.text
    assert "matmul" not in page.text  # what backends measure is no result
    manifest = json.loads((folder / "checkpoints/step-00000009/manifest.json").read_text())
    for entry in manifest["files"].values():
        assert entry["xxh128"] in page.text
    assert not any("damaged" in problem for problem in read_run(folder).problems)


def test_a_report_needs_no_other_file_and_no_script(copy: Copy):
    page = page_of(copy())
    assert set(page.tags) <= TAGS
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "style", "xlink:href")
        assert name != "href" or re.fullmatch(r"#[a-z0-9-]+", value)
        assert "://" not in value
    names = {value for _, name, value in page.attributes if name == "id"}
    assert {v.removeprefix("#") for _, name, v in page.attributes if name == "href"} <= names


def test_hostile_text_stays_text(copy: Copy, capsys: pytest.CaptureFixture[str]):
    folder = copy('"><img src=x onerror=alert(3)>')
    _append(folder, {"kind": "event", "step": 9, "event": f"{EVIL} \u202e\x1b[2J"})
    _append(
        folder, {"kind": "train", "step": 10, f"loss/{EVIL}": 1.0, EVIL: 2.0, "loss/main": EVIL}
    )
    _append(folder, {"kind": "validation", "step": 10, f"validation/{EVIL}/bits_per_byte": 3.0})
    _append(folder, {"kind": "train", "step": 10, f"moe/{EVIL}/load_max_over_mean": 3.0})
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{recipe.read_text()}note: {json.dumps(EVIL)}\n")
    status = {"state": EVIL, "step": 10, "exit_code": 0}
    (folder / "status.json").write_text(json.dumps(status))
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["starts"][0] |= {
        "recipe": EVIL,
        "extends": [EVIL],
        "changes": [{"setting": EVIL, "parent": EVIL, "value": EVIL}],
    }
    (folder / "provenance.json").write_text(json.dumps(provenance))
    experts = json.loads((folder / "experts.json").read_text())
    experts["layers"] = {EVIL: next(iter(experts["layers"].values()))}
    (folder / "experts.json").write_text(json.dumps(experts))
    table = [{"module": EVIL, "kind": EVIL, "format": EVIL, "reason": EVIL}]
    (folder / "precision.json").write_text(json.dumps(table))
    _write_rollout(folder, EVIL)
    page = page_of(folder)
    assert set(page.tags) <= TAGS
    assert not any(name.startswith("on") or name == "src" for _, name, _ in page.attributes)
    assert page.text.count("<script>alert('x')</script>") > 12
    assert r"\u202e\x1b[2J" in page.text
    assert "\x1b" not in capsys.readouterr().out
    # of two runs, too, where names stand in other places
    both = Markup(render([read_run(folder), read_run(copy("other"))]))
    assert set(both.tags) <= TAGS
    assert not any(name.startswith("on") for _, name, _ in both.attributes)


def test_answers_of_a_reinforcement_run_are_samples_and_its_figures_are_drawn(copy: Copy):
    folder = copy()
    _write_rollout(folder, "What is 6 times 7?")
    figures = {"rl/reward": 0.25, "rl/reward/sums": 0.75, "rl/gen_kl_error": 1e-4}
    _append(folder, {"kind": "train", "step": 10, **figures, "loss/policy": 0.5, "new/figure": 7})
    _append(folder, {"kind": "validation", "step": 10, "validation/reward": 0.875})
    page = page_of(folder)
    for text in (
        "sums: reward 1.0",
        "What is 6 times 7? It is 42.",
        "Rewards and answers",
        "training 0.25 validation 0.875",
        "best validation reward 0.8750",
        "k3 1e-4",
        "policy 0.5",
        "Other figures new/figure new/figure 7",
    ):
        assert text in page.text


def test_damage_is_counted_and_the_rest_is_shown(copy: Copy, capsys: pytest.CaptureFixture[str]):
    folder = copy()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    lines[3:3] = [
        b"\0\xff{\n",
        b"[1]\n",
        b'{"kind": "train", "step": "x"}\n',
        b"[" * 100_000 + b"\n",
    ]
    lines.append(b'{"kind": "train", "st')  # a run is writing it
    metrics.write_bytes(b"".join(lines))
    (folder / "provenance.json").write_text("{}")
    (folder / "experts.json").write_text("[1, 2")
    (folder / "recipe.yaml").write_bytes(b"\xff\xfe")
    (folder / "checkpoints/step-00000009/manifest.json").write_text("{}")
    page = page_of(folder)
    error = capsys.readouterr().err
    for text in (
        f"4 damaged lines of {metrics} are left out.",
        "provenance.json: id: Field required",
        "experts.json: is damaged",
        "recipe.yaml: byte 0 is not UTF-8 text",
        "step-00000009 manifest.json",
    ):
        assert text in page.text
        assert text in error
    assert "training" in page.text


def test_a_run_without_a_step_has_a_page(copy: Copy):
    folder = copy()
    for name in ("metrics.jsonl", "experts.json", "provenance.json", "recipe.yaml"):
        (folder / name).unlink()
    assert "There is no record of a step yet." in page_of(folder).text


def test_a_run_that_was_imported_and_never_started_has_a_page(copy: Copy):
    folder = copy("imported")
    for name in ("metrics.jsonl", "status.json", "experts.json", "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)
    origin = {"id": "0", "starts": [], "imported": {"folder": "exported"}}
    (folder / "provenance.json").write_text(json.dumps(origin))
    assert run(["report", str(folder), "--out", str(folder / "page.html")]) == 0


def test_several_runs_are_overlaid_with_what_differs(copy: Copy, tmp_path: Path):
    first, second = copy("first"), copy("second")
    recipe = second / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("peak: 0.003", "peak: 0.004"))
    out = tmp_path / "both.html"
    assert run(["report", str(first), str(second), "--out", str(out)]) == 0
    page = Markup(out.read_text())
    assert "setting that differs first second schedule.peak 0.003 0.004" in page.text
    last = read_metrics(first / "metrics.jsonl")[-2]
    value = short(float(last["loss/main"] or 0))
    lost = "1 not finite"  # in the step that was skipped
    text = f"Next token: training nats per token first {value} {lost} second {value} {lost}"
    assert text in page.text
    assert not (first / "report.html").exists()


@pytest.mark.slow
def test_twenty_thousand_steps_are_small_and_quick(copy: Copy):
    folder = copy()
    metrics = folder / "metrics.jsonl"
    lines = [
        re.sub(r'"(step|data/tokens)": \d+', r'"\1": STEP', line)
        for line in metrics.read_text().splitlines(keepends=True)
    ]
    train, validation = (
        [line for line in lines if f'"kind": "{kind}"' in line] for kind in ("train", "validation")
    )
    with open(metrics, "w") as file:
        for step in range(1, 20_001):
            file.write(train[step % len(train)].replace("STEP", str(step)))
            if step % 100 == 0:
                file.write(validation[0].replace("STEP", str(step)))
    start = time.process_time()
    page = render([read_run(folder)])
    assert time.process_time() - start < 5
    assert len(page.encode()) < 3 << 20


def test_checkpoints_continue_a_prompt(copy: Copy):
    folder = copy()
    page = page_of(folder, "--prompt", "def read", "--max-new-tokens", "3")
    assert page.texts.count("def read") == 3  # of steps 6, 8 and 9
    assert "step 6 def read" in page.text


def _append(folder: Path, record: dict) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def _write_rollout(folder: Path, question: str) -> None:
    answer = "It is 42." if question[0] == "W" else question
    rollout = Rollout(
        Task("sums", {"messages": [{"role": "user", "content": question}]}, (1, 2)),
        group=0,
        tokens=[3],
        logprobs=[-0.5],
        forced=[False],
        is_truncated=False,
        version=9,
        response=Response(answer),
        verdict=Verdict(1.0),
    )
    (folder / "rollouts").mkdir()
    (folder / "rollouts/step-00000009.jsonl").write_text(rollout.as_line() + "\n")
