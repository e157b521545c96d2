"""2N steps = N + any end + N, bit for bit, the metrics file included."""

import json
import signal
import time
from pathlib import Path

import pytest

from nemotron.train.config import PretrainConfig
from nemotron.train.start import train
from tests.support.forked import Forked
from tests.support.same_run import assert_same_run, computed_metrics


def start(config: PretrainConfig) -> Forked:
    return Forked(train, config, output=Path(config.output).parent / f"{config.name}.txt")


def wait_for_step(config: PretrainConfig, step: int, process: Forked) -> None:
    metrics = Path(config.output) / config.name / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError(process.text)


def long(steps: int = 400) -> dict:
    return {"peak": 1e-2, "total_steps": steps, "warmup_steps": 2, "decay_steps": 3}


@pytest.mark.slow
def test_stopping_and_resuming_changes_no_bit(recipe, undisturbed, capsys):
    config = recipe("stopped")
    run = Path(config.output) / config.name
    assert train(config, stop_at=3) == 75
    assert "--resume" in capsys.readouterr().out
    assert train(config, resume=True, stop_at=5) == 75
    assert train(config, resume=True) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(recipe, undisturbed):
    config = recipe("killed")
    process = start(config)
    wait_for_step(config, 5, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = Path(config.output) / config.name
    assert not (run / "checkpoints" / "step-00000008").exists()
    assert train(config, resume=True) == 0
    assert_same_run(run, undisturbed)


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(recipe, undisturbed):
    config = recipe("early")
    process = start(config)
    wait_for_step(config, 1, process)
    process.end()
    run = Path(config.output) / config.name
    assert train(config, resume=True) == 0
    assert_same_run(run, undisturbed)


def test_sigterm_saves_and_says_how_to_go_on(recipe):
    config = recipe("terminated", schedule=long())
    process = start(config)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGTERM)
    code, output = process.wait(), process.text
    assert code == 75, output
    assert "stopped by SIGTERM" in output
    assert f"{config.output}/terminated --resume" in output
    done = computed_metrics(Path(config.output) / "terminated")[-1]["step"]
    assert f"step-{done:08d}" in output


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once(recipe):
    # steps long enough that the second signal arrives within the first one's step
    batch = {"global_tokens": 31 * 120, "micro_batch": 2}
    config = recipe("impatient", schedule=long(), batch=batch)
    process = start(config)
    wait_for_step(config, 1, process)
    time.sleep(0.2)  # the first one within a step, too: between two, it saves at once
    process.send_signal(signal.SIGINT)
    process.wait_for_text("Ctrl-C again")
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    run = Path(config.output) / config.name
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same(
    recipe, undisturbed, capsys
):
    config = recipe("damaged")
    run = Path(config.output) / config.name
    assert train(config, stop_at=4) == 75
    shard = run / "checkpoints" / "step-00000004" / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert train(config, resume=True) == 0
    assert "step-00000004 is damaged" in capsys.readouterr().out
    assert_same_run(run, undisturbed)


def test_a_finished_run_has_nothing_left_to_do(recipe, capsys):
    config = recipe("short", schedule={"kind": "constant", "peak": 1e-3, "total_steps": 2})
    assert train(config) == 0
    metrics = Path(config.output) / "short" / "metrics.jsonl"
    before = metrics.read_bytes()
    assert train(config, resume=True) == 0
    assert "finished" in capsys.readouterr().out
    assert metrics.read_bytes() == before


def test_every_line_of_metrics_is_one_json_object_in_the_order_of_steps(undisturbed):
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert steps == list(range(1, 9))
