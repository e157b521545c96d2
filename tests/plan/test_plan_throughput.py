"""The model of time, its fit, and the table in the page."""

from pathlib import Path
from types import ModuleType

import pytest

from nemotron.errors import UserError
from nemotron.parallel.config import ParallelConfig, PipelineConfig
from nemotron.parallel.dims import ParallelDims, violations
from nemotron.plan.calibration import calibration_rows, error, fit
from nemotron.plan.hardware import NAMES, SYSTEMS, find_hardware
from nemotron.plan.published import ROWS, Published
from nemotron.plan.throughput import FITTED, Constants, predict, stated_efficiency, terms
from tests.support.plan_jobs import super_job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_every_published_row_is_a_layout_that_breaks_no_rule(row: Published):
    job = row.job
    assert job.dims.world == row.gpus
    found = violations(
        job.dims,
        job.model,
        ParallelConfig(),
        seq_len=job.seq_len,
        rows_per_step=job.rows,
        micro_batch=job.micro_batch,
    )
    assert list(found) == []
    assert predict(job).step > 0


def test_the_constants_are_what_the_fit_gives():
    # they are written with four digits
    assert tuple(fit(calibration_rows())) == pytest.approx(tuple(FITTED), rel=1e-3)


def test_a_third_of_the_rows_is_held_out_and_not_fitted():
    held_out = [row for row in ROWS if row.held_out]
    assert len(held_out) >= len(ROWS) / 3
    assert not set(held_out) & set(calibration_rows())
    assert all(row.held_out for row in ROWS if row.system == "gb200")


def test_constants_that_made_the_times_are_found_again():
    true = Constants(1.7, 12.0, 0.9, 1.5e-3)
    rows = []
    for row in calibration_rows():
        step = predict(row.job, true)
        busy = step.busy / (1 - step.bubble)
        speed = row.rows * row.seq_len / busy / row.gpus
        rows.append(Published(**{**vars(row), "tokens_per_second": speed}))
    assert tuple(fit(rows)) == pytest.approx(tuple(true), rel=1e-6)


def test_fitted_rows_are_met_within_a_fifth():
    for row in calibration_rows():
        assert abs(error(row, FITTED)) < 0.2, row.title


def test_the_page_holds_the_table_as_it_is_made():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        import plan_table

        assert isinstance(plan_table, ModuleType)
        page = (ROOT / "docs/plan.md").read_text()
        assert plan_table.insert(page) == page


def test_a_stated_efficiency_is_work_over_peak():
    job = super_job(ParallelDims(dp_shard=64, ep=8), recompute=frozenset(), dispatch="per_rank")
    guess = predict(job, stated_efficiency(0.4))
    # 8192 tokens of 85.4 GFLOP at 40 % of 989 TFLOP/s: 1.77 s a micro-batch
    assert guess.arithmetic / job.micro_batches == pytest.approx(1.77, abs=0.005)
    assert guess.memory_traffic == guess.overhead == 0


def test_recomputing_everything_costs_the_forward_pass_of_the_stack():
    job = super_job(ParallelDims(dp_shard=64, ep=8))
    kept = super_job(ParallelDims(dp_shard=64, ep=8), recompute=frozenset())
    ratio = terms(job)[0] / terms(kept)[0]
    # the head is not computed again
    assert 1.25 < ratio < 4 / 3


def test_the_bubble_shrinks_with_micro_batches_and_stages_on_a_rank():
    dims = ParallelDims(pp=4, dp_shard=16)
    assert predict(super_job(dims, rows=64)).bubble == pytest.approx(3 / 7)
    assert predict(
        super_job(
            dims, rows=64, pipeline=PipelineConfig(schedule="interleaved_1f1b", stages_per_rank=3)
        )
    ).bubble == pytest.approx(1 / 5)
    assert predict(super_job(ParallelDims(dp_shard=64), rows=64)).bubble == 0


def test_a_stage_is_never_less_than_head_and_further_depths():
    job = super_job(ParallelDims(pp=16, dp_shard=4), depths=2)
    # 15.2 % of the work of a token, and the one layer that a stage has at least
    assert 0.152 < job.stage_share < 0.17
    assert sum(job.layers_on("last").values()) == 1


def test_what_runs_beside_counts_where_it_takes_longer():
    slow = predict(super_job(ParallelDims(dp_shard=1024), rows=1024))
    assert slow.bound == "weights and gradients"
    assert slow.step == slow.beside


def test_a_format_that_a_system_lacks_runs_as_the_next_wider_one():
    assert SYSTEMS["h100"].peak("fp4") == SYSTEMS["h100"].peak("fp8")
    assert SYSTEMS["b200"].peak("fp4") > SYSTEMS["b200"].peak("fp8")


def test_every_system_is_found_and_an_unknown_one_named():
    assert set(SYSTEMS) | {"cpu"} == set(NAMES)
    with pytest.raises(UserError, match="--hardware = v100 is unknown; use one of h100, h200"):
        find_hardware("v100", 8)


def test_processes_share_the_machine():
    one, four = find_hardware("cpu", 1), find_hardware("cpu", 4)
    assert four.memory == one.memory / 4
    assert four.domain == 4
