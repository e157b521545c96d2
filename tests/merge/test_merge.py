"""Checkpoints of a really trained run, averaged by the command."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.manifest import FORMAT, verify
from nemotron.checkpoint.read import read_model
from nemotron.cli import run
from nemotron.hf.source import open_checkpoint
from nemotron.merge.coefficients import coefficients
from tests.support.old_checkpoint import seal

STEPS = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merge")
    words = ["train", "tiny/smoke", f"output={folder}", "name=trained", "--plain"]
    words += ["checkpoint.every_steps=2", "checkpoint.keep=9", "schedule.total_steps=8"]
    words += ["schedule.warmup_steps=1", "schedule.decay_steps=1", "evaluation.tokens=512"]
    assert run(words) == 0
    return folder / "trained"


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, read by the library of the format."""
    [file] = (folder / f"checkpoints/step-{step:08d}").glob("*.safetensors")
    found = load_file(file)
    return {name: torch.from_numpy(found[name]) for name in found if name.startswith("model.")}


def refusal(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(os.walk(folder))
    capsys.readouterr()
    assert run(["merge", *words]) == 2
    assert sorted(os.walk(folder)) == before
    [sentence] = capsys.readouterr().err.strip().splitlines()
    return sentence


def test_every_tensor_is_the_weighted_sum(trained: Path, tmp_path: Path):
    out = tmp_path / "merged"
    assert run(["merge", str(trained), "--out", str(out), "--shape", "linear", "--last", "3"]) == 0
    info = verify(locate(out).info.folder)
    assert info.step == 8
    merged = stored(out, 8)
    parts = [stored(trained, step) for step in STEPS[1:]]
    # a decay over two intervals has the means 3/4 and 1/4, so updates count that much
    wanted = {
        name: sum(c * part[name].double() for c, part in zip((0.25, 0.5, 0.25), parts, strict=True))
        for name in parts[0]
    }
    assert merged.keys() == wanted.keys()
    changed = 0
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        # three float32 products and two sums, each rounded to half a unit
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=3e-7, atol=1e-9)
        changed += not torch.equal(tensor, parts[-1][name])
    assert changed > len(merged) / 2
    assert any("expert_bias" in name or "correction_bias" in name for name in merged)


def test_the_merged_run_is_a_run_for_all_commands(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "merged"
    assert run(["merge", str(trained), "--out", str(out), "--last", "2"]) == 0
    assert open_checkpoint(out).is_trained
    facts = json.loads((out / "provenance.json").read_text())["merged"]
    assert facts["steps"] == [6, 8]
    assert facts["coefficients"] == coefficients("minus_sqrt", facts["tokens"])
    assert run(["generate", str(out), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert run(["export", str(out), "--no-check"]) == 0
    again = tmp_path / "again"
    assert run(["import", str(out / "export"), "--out", str(again)]) == 0
    values = read_model(again)[1]["backbone.norm_f.weight"]
    torch.testing.assert_close(
        values, read_model(out)[1]["backbone.norm_f.weight"], rtol=2**-8, atol=0
    )
    tune = ["train", "tiny/smoke", f"output={tmp_path}", "name=on", f"init_from={out}"]
    tune += ["schedule.total_steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=1"]
    assert run(tune) == 0


def test_a_search_writes_the_average_with_the_lowest_loss(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "merged"
    words = [str(trained), "--out", str(out), "--search", "--last", "2", "--last", "4"]
    assert run(["merge", *words]) == 0
    said = capsys.readouterr().out
    table = [line.split(maxsplit=1) for line in said.splitlines() if line.lstrip()[0].isdigit()]
    losses = {what: float(loss) for loss, what in table if "checkpoints" in what or "alone" in what}
    assert len(losses) == 1 + 2 * 4
    alone = losses.pop("step 8 alone")
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    [last] = [row for row in logged if row.get("step") == 8 and "validation/loss" in row]
    assert alone == pytest.approx(last["validation/loss"], abs=1e-4)  # printed with five digits
    best = min(losses, key=losses.__getitem__)
    assert f"merged {best} into {out}" in said
    assert ("no average is better" in said) == (losses[best] >= alone)


def test_a_long_window_is_named(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    said = {}
    for last in (2, 4):
        capsys.readouterr()
        out = ["--out", str(tmp_path / f"of-{last}")]
        assert run(["merge", str(trained), *out, "--last", str(last)]) == 0
        said[last] = capsys.readouterr().out
    # steps 2 to 8 of 8, and steps 6 to 8
    assert "lie 75% of the run's tokens apart" in said[4]
    assert "lie 25% of the run's tokens apart" in said[2]


def test_a_damaged_checkpoint_is_left_out_and_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied = tmp_path / "copied"
    shutil.copytree(trained, copied)
    [file] = (copied / "checkpoints/step-00000004").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    out = tmp_path / "merged"
    assert run(["merge", str(copied), "--out", str(out), "--shape", "uniform"]) == 0
    assert "step-00000004 is damaged" in capsys.readouterr().out
    facts = json.loads((out / "provenance.json").read_text())["merged"]
    assert (facts["steps"], facts["damaged"]) == ([2, 6, 8], [4])
    assert run(["export", str(out), "--no-check"]) == 0
    card = (out / "export/README.md").read_text()
    assert "| average of steps | 2, 6, 8 |" in card
    assert "| left out, damaged: steps | 4 |" in card


def test_tokens_that_do_not_rise_are_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied = tmp_path / "copied"
    shutil.copytree(trained, copied)
    checkpoint = copied / "checkpoints/step-00000004"
    state = json.loads((checkpoint / "state.json").read_text())
    state["trainer"]["tokens"] = 1
    (checkpoint / "state.json").write_text(json.dumps(state))
    seal(checkpoint, 4, FORMAT)
    out = ["--out", str(tmp_path / "merged")]
    assert "it has seen 1 tokens, and step 2" in refusal([str(copied), *out], tmp_path, capsys)


def test_wrong_input_is_one_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = ["--out", str(tmp_path / "merged")]
    cases = [
        ([str(tmp_path / "none"), *out], "give the folder of a run"),
        ([str(trained), *out, "--last", "5"], "is more than the 4 whole checkpoints"),
        ([str(trained), *out, "--step", "6"], "names one checkpoint"),
        ([str(trained), *out, "--step", "6", "--step", "7"], "there are 2, 4, 6, 8"),
        ([str(trained), *out, "--last-tokens", "1"], "contains one checkpoint"),
        ([str(trained), *out, "--last-tokens", "-3"], "must be above 0"),
        ([str(trained), *out, "--last-tokens", "1e9"], "the tokens of step 8"),
        ([str(trained), *out, "--shape", "round"], "use one of minus_sqrt"),
        ([str(trained), *out, "--shape", "ema", "--ema-decay", "0"], "must be above 0"),
        ([str(trained), *out, "--ema-decay", "0.5"], "has no effect without --shape ema"),
        ([str(trained), *out, "--last", "2", "--last", "3"], "add --search"),
        ([str(trained), "--out", str(trained), "--overwrite"], "choose another folder"),
        ([str(trained), "--out", str(trained / "checkpoints/x")], "checkpoints folder"),
    ]
    for words, said in cases:
        assert said in refusal(words, tmp_path, capsys)
