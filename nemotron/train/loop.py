"""Between the loop and the world: what is told, saved and said at the end of a run."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from nemotron.checkpoint.background import BackgroundSaver
from nemotron.checkpoint.find import newest
from nemotron.checkpoint.manifest import folder_name
from nemotron.checkpoint.write import CheckpointNotSaved, save
from nemotron.data.chat.template import TEMPLATE, TURN_END
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.ops.describe import choose_backends
from nemotron.ops.describe import describe as describe_backends
from nemotron.precision.apply import DTYPES
from nemotron.precision.policy import summarize
from nemotron.run import provenance
from nemotron.run.folder import RunFolder
from nemotron.run.metrics import MetricsFile, Record
from nemotron.run.screen import Screen
from nemotron.run.signals import StopRequest
from nemotron.run.trackers import TRACKERS, Mirrors, TrackedRun
from nemotron.train.faults import describe as describe_fault
from nemotron.train.flops import count_parameters
from nemotron.train.replicas import ReplicasDiffer
from nemotron.train.rollback import roll_back
from nemotron.train.trainer import Diverged, Hooks, Trainer

DONE, FAILED, STOPPED = 0, 1, 75
"""Exit codes; 75 (EX_TEMPFAIL) asks a scheduler to start the same command again."""

STATES = {DONE: "done", FAILED: "failed", STOPPED: "stopped"}


class Session:
    """One start of a run: from the restored state to the next exit."""

    _metrics: MetricsFile | None

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        screen: Screen,
        stop: StopRequest,
        stop_at: int | None,
    ) -> None:
        self._trainer, self._folder, self._screen = trainer, folder, screen
        self._stop, self._stop_at = stop, stop_at
        self._saved_step: int | None = None
        self._validation: Record = {}
        self._background: BackgroundSaver | None = None
        if trainer.config.checkpoint.background:
            self._background = BackgroundSaver(trainer.ranks)
        names: tuple[str, ...] = trainer.config.logging.trackers
        self._mirrors = Mirrors({name: TRACKERS[name]() for name in names}, screen.tell)

    def restore(self) -> bool:
        """Go to the newest whole checkpoint; says whether there was one.

        Raises:
            UserError: when there are checkpoints, but none of them is whole or fits.
        """
        found = newest(self._folder.checkpoints, self._trainer.ranks)
        for line in found.skipped:
            self._screen.tell(line)
        if found.info is None:
            if damaged := [line for line in found.skipped if "damaged" in line]:
                raise UserError(
                    f"{self._folder.checkpoints} holds no complete checkpoint: {damaged[0]}; "
                    f"remove the damaged ones to start at step 0, or give the run another name."
                )
            self._screen.tell(f"{self._folder.path} has no checkpoint; starting at step 0")
            return False
        self._trainer.restore(found.info)
        self._saved_step = found.info.step
        self._screen.tell(f"resumed at step {found.info.step} from {found.info.folder}")
        return True

    def run(self, recipe_path: str) -> int:
        """Train; returns the exit code."""
        trainer, folder = self._trainer, self._folder
        if trainer.state.step >= trainer.course.num_steps:
            self._tell_results("this run is finished")
            return DONE
        code = self._train(recipe_path)
        if trainer.ranks.is_first:
            folder.write_status(STATES[code], trainer.state.step, code)
        return code

    def _train(self, recipe_path: str) -> int:
        trainer, folder, screen = self._trainer, self._folder, self._screen
        state, num_steps, ranks = trainer.state, trainer.course.num_steps, trainer.ranks
        log = folder.log_of(ranks.rank)
        log.parent.mkdir(exist_ok=True)
        screen.open_log(log)
        with ExitStack() as stack:
            self._metrics = None
            run_id = self._describe(recipe_path)
            if ranks.is_first:
                folder.write_status("running", state.step)
                metrics = MetricsFile(folder.metrics, last_step=state.step)
                self._metrics = stack.enter_context(metrics)
                self._mirrors.start(self._tracked(run_id))
                stack.callback(self._mirrors.finish)
            screen.start(folder.path.name, num_steps)
            stack.callback(screen.stop)
            try:
                if not ranks.any(self._must_stop(state.step)):
                    trainer.run(
                        Hooks(
                            report=self._report,
                            tell=screen.tell,
                            save=self._save_or_warn,
                            go_back=self._go_back,
                            stop=self._must_stop,
                        )
                    )
                self._save()
                self._finish_save(wait=True)
            except (Diverged, ReplicasDiffer, CheckpointNotSaved) as problem:
                screen.stop()
                screen.tell(f"failed: {problem}")
                if self._saved_step is not None:
                    screen.tell(f"the newest checkpoint is {folder_name(self._saved_step)}")
                return FAILED
        state = trainer.state  # going back gave the trainer another one
        if state.step < num_steps:
            reached = self._stop_at is not None and state.step >= self._stop_at
            by_step = f"--stop-at {self._stop_at}" if reached else "a signal to another rank"
            reason = self._stop.signal or by_step
            screen.tell(f"stopped by {reason} after step {state.step} of {num_steps}, saved")
            screen.tell(f"go on: {self._command('train', self._folder.recipe, '--resume')}")
            return STOPPED
        self._tell_results("done")
        return DONE

    def _must_stop(self, steps: int) -> bool:
        reached = self._stop_at is not None and steps >= self._stop_at
        return reached or self._stop.signal is not None

    def _report(self, record: Record) -> None:
        if self._metrics is not None:
            self._metrics.write(record)
            self._mirrors.log(record)
        self._screen.show(record)
        if record["kind"] == "validation":
            self._validation = record
        if record["kind"] == "train":
            self._or_warn(lambda: self._finish_save(wait=False))

    def _save_or_warn(self) -> None:
        self._or_warn(self._save)

    def _or_warn(self, act: Callable[[], None]) -> None:
        try:
            act()
        except CheckpointNotSaved as problem:
            self._screen.tell(f"warning: {problem}; training goes on")

    def _go_back(self, bad: Sequence[int]) -> None:
        """Return to a checkpoint from before the steps of these indices."""
        trainer = self._trainer
        reached = trainer.state.step
        self._or_warn(lambda: self._finish_save(wait=True))
        trainer.progress.enter(reached - 1, "restore")
        info = roll_back(trainer, self._folder.checkpoints, bad)
        if self._metrics is not None:
            self._metrics.go_back(info.step)
        self._saved_step = info.step
        self._screen.tell(
            f"step {reached}: {len(bad)} steps from {bad[0] + 1} to {bad[-1] + 1} were skipped; "
            f"going back to {folder_name(info.step)}, and over the data of those steps"
        )

    def _save(self) -> None:
        """Write a checkpoint of this step unless it is there already."""
        trainer, step = self._trainer, self._trainer.state.step
        self._finish_save(wait=True)
        if step == self._saved_step:
            return
        trainer.check_replicas()
        trainer.progress.enter(step - 1, "save")
        if self._metrics is not None:
            self._metrics.sync()
        start = time.perf_counter()
        content = (
            self._folder.checkpoints,
            step,
            trainer.tensors(),
            trainer.json_state(),
            trainer.config.model,
            trainer.config.checkpoint.keep,
        )
        if self._background is None:
            save(*content, trainer.ranks)
            self._saved_step = step
            self._screen.tell(f"saved {folder_name(step)} in {time.perf_counter() - start:.1f} s")
            return
        self._background.start(*content)
        seconds = time.perf_counter() - start
        self._screen.tell(f"copied {folder_name(step)} in {seconds:.1f} s, to be written beside")

    def _finish_save(self, *, wait: bool) -> None:
        """Make a checkpoint of what was written beside training, if all of it is."""
        if self._background is None or (step := self._background.step) is None:
            return
        self._trainer.progress.enter(self._trainer.state.step - 1, "save")
        if self._background.finish(wait=wait) is not None:
            self._saved_step = step
            self._screen.tell(f"saved {folder_name(step)}")

    def _describe(self, recipe_path: str) -> str:
        """Write what the run is to its folder and the screen; returns the run's identifier."""
        trainer, folder, screen = self._trainer, self._folder, self._screen
        config, data, ranks = trainer.config, trainer.data, trainer.ranks
        if ranks.is_first:
            self._write_description()
        with torch.device("meta"):
            count = count_parameters(HybridLM(config.model), config.model)
        sizes = {"parameters": count.total, "active": count.active, "mtp": count.mtp}
        facts = provenance.collect(trainer.device)
        facts |= {"recipe": recipe_path, "seed": config.seed, **sizes}
        facts["matmul_peak_flops"] = trainer.peak_flops
        dtype, documents = DTYPES[config.precision.compute], config.data.reset_documents
        choices = choose_backends(trainer.device, dtype, documents)
        facts["backends"] = {choice.operation: asdict(choice) for choice in choices}
        facts["ranks"] = ranks.world
        run_id = ""
        if ranks.is_first:
            run_id = provenance.record_start(folder.provenance, trainer.state.step, facts)
        mtp = f" + {count.mtp:,} for multi-token prediction" if count.mtp else ""
        screen.tell(f"run        {folder.path} ({trainer.device}, {config.precision.compute})")
        if trainer.mesh is not None:
            screen.tell(f"ranks      {trainer.mesh.describe()}")
        for fault in config.reliability.faults:
            screen.tell(f"warning    a fault is injected: {describe_fault(fault)}")
        screen.tell(f"model      {count.total:,} parameters, {count.active:,} active{mtp}")
        for line in describe_backends(choices, trainer.device):
            screen.tell(f"operations {line}")
        if config.precision.quantizes:
            table = trainer.quantization.table
            if ranks.is_first:
                folder.write_precision([asdict(line) for line in table])
            for line in summarize(table):
                screen.tell(f"precision  {line}")
        for line in data.describe():
            screen.tell(f"data       {line}")
        screen.tell(
            f"training   {trainer.course.num_steps:,} steps, "
            f"{trainer.course.timeline.num_tokens:,} tokens; matrix products reach "
            f"{trainer.peak_flops / 1e9:,.0f} GFLOP/s here"
        )
        return run_id

    def _write_description(self) -> None:
        config, data = self._trainer.config, self._trainer.data
        self._folder.write_description(data.tokenizer.content)
        if data.has_conversations:
            ends = dict.fromkeys([config.model.eos_token_id, data.tokenizer.id(TURN_END)])
            others = {
                "bos_token_id": config.model.bos_token_id,
                "pad_token_id": config.model.pad_token_id,
            }
            self._folder.write_chat_files(TEMPLATE, list(ends), others)

    def _tracked(self, run_id: str) -> TrackedRun:
        config = self._trainer.config
        return TrackedRun(
            project=config.logging.project,
            name=config.name,
            id=run_id,
            folder=self._folder.path,
            step=self._trainer.state.step,
            config=config.model_dump(mode="json"),
        )

    def _tell_results(self, how: str) -> None:
        folder, state = self._folder, self._trainer.state
        bits = self._validation.get("validation/bits_per_byte")
        quality = f", validation {bits:.3f} bits per byte" if isinstance(bits, float) else ""
        for line in (
            f"{how}: {state.step:,} steps, {state.tokens:,} tokens{quality}",
            f"  metrics      {folder.metrics}",
            f"  checkpoint   {folder.checkpoints / folder_name(state.step)}",
            "next:",
            f"  {self._command('generate', folder.path, '--prompt', 'Once upon a time')}",
            f"  {self._command('export', folder.path, '--out', folder.path / 'export')}",
        ):
            self._screen.tell(line)

    def _command(self, *arguments: str | Path) -> str:
        return shlex.join([*_program(), *map(str, arguments)])


def _program() -> list[str]:
    """Return how this program can be started again from the same folder."""
    if Path(sys.argv[0]).name == "nemotron":
        on_path = shutil.which("nemotron")
        same = on_path is not None and Path(on_path).samefile(sys.argv[0])
        return ["nemotron" if same else sys.argv[0]]
    return [sys.executable, "-m", "nemotron"]
