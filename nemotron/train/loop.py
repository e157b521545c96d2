"""The training loop, from the restored state to the next exit."""

import math
from collections.abc import Sequence
from contextlib import ExitStack

from nemotron.checkpoint.state import PassedOver
from nemotron.checkpoint.write import CheckpointNotSaved
from nemotron.device import measure_matmul_peak
from nemotron.errors import exit_code
from nemotron.exit_codes import DONE, FAILED, INTERRUPTED, STOPPED
from nemotron.precision.apply import DTYPES
from nemotron.run.folder import RunFolder
from nemotron.run.log import RunLog
from nemotron.run.metrics import MetricsFile
from nemotron.run.provenance import Facts
from nemotron.run.signals import StopRequest
from nemotron.run.trackers import TRACKERS, Mirrors
from nemotron.train.announce import announce, announce_failure, announce_results, announce_stop
from nemotron.train.profile import Profiler
from nemotron.train.record import StepResult, expert_tables
from nemotron.train.reliability.progress import Stopwatch
from nemotron.train.reliability.replicas import ReplicasDiffer
from nemotron.train.reliability.stragglers import Stragglers
from nemotron.train.save import Saver
from nemotron.train.setup import Setup
from nemotron.train.state import Diverged
from nemotron.train.trainer import Trainer

STATES = {DONE: "done", FAILED: "failed", STOPPED: "stopped"}


def run(
    setup: Setup,
    folder: RunFolder,
    log: RunLog,
    saver: Saver,
    stop: StopRequest,
    origin: Facts,
) -> int:
    """Train, save and say how it ended; returns the exit code."""
    trainer = setup.trainer
    ranks, start, num_steps = trainer.ranks, trainer.state.step, trainer.plan.num_steps
    if start >= num_steps:
        announce_results(trainer, folder, log, "this run is finished")
        return DONE
    log.screen.open_log(folder.open_log(ranks.rank))
    profiler = Profiler(trainer, folder.profile)
    why: Exception | str | None = None
    with ExitStack() as stack:
        tracked = announce(setup, folder, log, origin)
        if ranks.is_first:
            folder.write_status("running", start)
            stop.before_leaving = lambda: folder.write_status(
                "failed", trainer.state.step, INTERRUPTED
            )
            metrics = stack.enter_context(MetricsFile(folder.metrics, last_step=start))
            names: tuple[str, ...] = trainer.config.logging.trackers
            mirrors = Mirrors({name: TRACKERS[name]() for name in names}, log.info)
            mirrors.start(tracked)
            stack.callback(mirrors.finish)
            log.open(metrics, mirrors, folder)
            if metrics.num_damaged:
                log.info(f"warning: {metrics.num_damaged} damaged lines of metrics.jsonl set aside")
        log.screen.start(folder.path.name, num_steps, trainer.plan.part)
        stack.callback(log.screen.stop)
        try:
            if not ranks.any(stop.begin(start)):
                loop(setup, log, saver, stop, profiler)
                for line in profiler.table():
                    log.info(line)
            saver.save()
            saver.finish(wait=True)
        except (Diverged, ReplicasDiffer, CheckpointNotSaved) as error:
            why = error
        except BaseException as error:
            if ranks.is_first:
                folder.write_status("failed", trainer.state.step, exit_code(error))
                if isinstance(error, OSError):  # which may be what the loss of the folder led to
                    folder.check_held()
            raise
    step = trainer.state.step
    if why is not None:
        code = FAILED
        announce_failure(log, why, saver.saved_step)
    elif step < num_steps:
        code = STOPPED
        why = announce_stop(trainer, folder, log, stop)
    else:
        code = DONE
        announce_results(trainer, folder, log, "done")
    if ranks.is_first:
        folder.write_status(STATES[code], step, code, why)
        log.catch_up()
    return code


def loop(setup: Setup, log: RunLog, saver: Saver, stop: StopRequest, profiler: Profiler) -> None:
    """Train to the end of the schedule, or until a rank is asked to stop.

    Raises:
        Diverged: when `nonfinite_limit` steps in a row were skipped, or a rollback does not help.
        ReplicasDiffer: when ranks do not hold alike what they must.
    """
    trainer = setup.trainer
    config, ranks, num_steps = trainer.config, trainer.ranks, trainer.plan.num_steps
    stragglers = Stragglers(config.reliability, ranks, trainer.device)
    while (step := trainer.state.step) < num_steps:
        is_last = step + 1 == num_steps
        if (passed := trainer.state.range_over(step)) is not None:
            _pass_over(trainer, step, passed, log)
            stops = ranks.any(stop.is_due(step + 1))
        else:
            if trainer.quantization.begin(step, 0):
                preset = trainer.quantization.preset
                _event(trainer, log, f"precision: preset {preset} from here on")
            watch = Stopwatch(trainer.device, trainer.progress, step)
            with profiler.around(step):
                watch.begin("data")
                batch = trainer.batches.take(step)
                result = trainer.update(step, batch, stop=stop, watch=watch)
            stragglers.add(result.watch)
            if is_last or due(step, config.logging.every_steps):
                across_ranks, slow = stragglers.report()
                values = trainer.values(step, result)
                log.record(trainer.record("train", values | across_ranks))
                if values["perf/mfu"] is None:
                    _correct_peak(trainer, log)
                saver.finish_or_warn(wait=False)
                if slow is not None:
                    log.info(f"step {step + 1}: {slow}")  # no metric: it depends on the clock
            if is_last or due(step, config.evaluation.every_steps):
                log.record_experts(step + 1, expert_tables(trainer.routers, result.sums.load))
            for text in result.events():
                _event(trainer, log, text)
            if bad := _steps_to_undo(trainer, result):
                saver.roll_back(bad)
                continue
            stops = result.stop
        if setup.validate is not None and (is_last or due(step, config.evaluation.every_steps)):
            trainer.progress.enter(step, "evaluate")
            log.record(trainer.record("validation", {**setup.validate()}))
        if setup.examine is not None and (
            is_last or due(step, config.evaluation.suites.every_steps)
        ):
            trainer.progress.enter(step, "evaluate")
            log.record(trainer.record("suites", {**setup.examine()}))
        if due(step, config.reliability.check_replicas_every_steps):
            trainer.check_replicas()
        if not is_last and due(step, config.checkpoint.every_steps):
            saver.save_or_warn()
        if stops or (not ranks.grouped and stop.is_due(step + 1)):
            return


def due(step: int, every: int | None) -> bool:
    """Say whether something that comes every so many steps comes after the step of this index."""
    return every is not None and (step + 1) % every == 0


def _correct_peak(trainer: Trainer, log: RunLog) -> None:
    """Measure the peak again that a step was faster than; of several ranks it stays unknown."""
    if math.isnan(trainer.peak_flops):
        return
    step, before, now = trainer.state.step, trainer.peak_flops, 0.0
    if trainer.ranks.world == 1:
        now = measure_matmul_peak(trainer.device, DTYPES[trainer.config.precision.compute])
    trainer.peak_flops = now if now > before else math.nan
    known = f"they reach {now / 1e9:,.0f} GFLOP/s now" if now > before else "no MFU is shown"
    log.info(
        f"step {step}: faster than matrix products were at the start ({before / 1e9:,.0f} "
        f"GFLOP/s), when other programs slowed them down; {known}"
    )


def _pass_over(trainer: Trainer, step: int, passed: PassedOver, log: RunLog) -> None:
    """Count a step of a range before which the run was rolled back."""
    first, last, origin = passed.first, passed.last, passed.origin
    trainer.state.pass_over(trainer.plan.timeline.tokens_per_step(step))
    if step == max(first, origin):
        text = f"passing over steps {first + 1} to {last + 1}, with the weights of step {origin}"
        _event(trainer, log, text)


def _steps_to_undo(trainer: Trainer, result: StepResult) -> Sequence[int]:
    """Return the bad ones among the last steps when there are too many of them, else none.

    Raises:
        Diverged: when too many in a row were skipped.
    """
    config, state = trainer.config, trainer.state
    bad = state.bad_within(config.reliability.rollback_window)
    if (limit := config.reliability.rollback_after) is not None and len(bad) >= limit:
        return bad
    if state.nonfinite_in_a_row + state.spikes_in_a_row >= config.nonfinite_limit:
        what = "not finite or spikes" if state.spikes_in_a_row else "not finite"
        raise Diverged(
            f"{config.nonfinite_limit} steps in a row were {what}, the last one step "
            f"{state.step}: {'; '.join(result.events())}"
        )
    return []


def _event(trainer: Trainer, log: RunLog, text: str) -> None:
    log.record(trainer.record("event", {"event": text}))
