"""A run in low precision: it learns, resumes to the bit, and changes its format when told."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron.run.metrics import read_metrics
from nemotron.train.start import train
from tests.support.cases import further
from tests.support.same_run import assert_same_run, final_tensors
from tests.support.tiny_run import build_recipe


def precision(preset: str, **changes: object) -> dict:
    return {"compute": "bf16", "preset": preset, **changes}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shards: dict[str, str]) -> Callable[[str], Path]:
    """Return the folder of a run with a preset, which is trained once."""

    @functools.cache
    def build(preset: str) -> Path:
        folder = tmp_path_factory.mktemp("presets")
        config = build_recipe(folder, shards, preset, precision=precision(preset))
        assert train(config) == 0
        return folder / "runs" / preset

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    ["nvfp4_super", "fp8_delayed", *map(further, ["mxfp8", "fp8_current", "fp8_block"])],
)
def test_every_preset_learns(trained: Callable[[str], Path], preset: str):
    records = read_metrics(trained(preset) / "metrics.jsonl")
    losses = [r["loss/main"] for r in records if r["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.nightly
def test_a_resumed_run_draws_the_same_bits_across_a_change_of_format(recipe, capsys):
    changing = precision("nvfp4_all", switches=[{"step": 3, "preset": "mxfp8"}])
    six = {"peak": 1e-2, "total_steps": 6, "warmup_steps": 2, "decay_steps": 3}
    whole, stopped = (
        recipe(name, precision=changing, schedule=six) for name in ("whole", "stopped")
    )
    assert train(whole) == 0
    told = capsys.readouterr().out
    assert "precision: preset mxfp8 from here on" in told
    assert "precision  nvfp4       mamba.in_proj x 1: default of nvfp4_all" in told
    for step in (3, 5):
        assert train(stopped, resume=step > 3, stop_at=step) == 75
    assert train(stopped, resume=True) == 0
    folder = Path(whole.output)
    assert_same_run(folder / "stopped", folder / "whole")
    assert all(t.dtype.itemsize != 1 for n, t in final_tensors(folder / "whole").items()
               if n.startswith("model."))  # fmt: skip
    table = json.loads((folder / "whole" / "precision.json").read_text())
    assert {line["format"] for line in table} == {"nvfp4"}
    plain = recipe("plain", precision=precision("nvfp4_all"), schedule=six)
    assert train(plain) == 0
    losses = [
        [
            r["loss/main"]
            for r in read_metrics(folder / name / "metrics.jsonl")
            if r["kind"] == "train"
        ]
        for name in ("whole", "plain")
    ]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][4:] != losses[1][4:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("nvfp4_all", "bf16"),
        further(("mxfp8", "fp8_delayed")),
        further(("fp8_delayed", "mxfp8")),
    ],
)
def test_a_run_may_go_on_in_another_format(recipe, before: str, after: str):
    assert train(recipe("moves", precision=precision(before)), stop_at=4) == 75
    config = recipe("moves", precision=precision(after))
    assert train(config, resume=True, allow_changed=["precision"]) == 0
    saved = final_tensors(Path(config.output) / "moves")
    scales = [t for name, t in saved.items() if name.endswith(".scale")]
    assert bool(scales) == (after == "fp8_delayed")
    assert all(t.isfinite().all() and (t != 1).any() for t in scales)


@pytest.mark.slow
@pytest.mark.nightly
def test_delayed_scales_go_on_where_a_run_was_stopped_and_start_anew_with_another_history(
    recipe, trained: Callable[[str], Path]
):
    stopped = recipe("cut", precision=precision("fp8_delayed"))
    assert train(stopped, stop_at=3) == 75
    assert train(stopped, resume=True) == 0
    folder = Path(stopped.output)
    assert_same_run(folder / "cut", trained("fp8_delayed"))
    shorter = precision("fp8_delayed", fp8_delayed={"history_length": 3})
    assert train(recipe("short", precision=precision("fp8_delayed")), stop_at=4) == 75
    config = recipe("short", precision=shorter)
    assert train(config, resume=True, allow_changed=["precision"]) == 0
    histories = [t for n, t in final_tensors(folder / "short").items() if "amax_history" in n]
    assert histories
    assert {t.shape[1] for t in histories} == {3}
