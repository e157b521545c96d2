"""What is said and written down of a run at its start and at its end."""

import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from nemotron.checkpoint.manifest import folder_name
from nemotron.data.chat.template import TEMPLATE, TURN_END
from nemotron.model.config import ModelConfig
from nemotron.model.parameters import count_parameters
from nemotron.ops.describe import choose_backends
from nemotron.ops.describe import describe as describe_backends
from nemotron.precision.apply import DTYPES
from nemotron.precision.policy import summarize
from nemotron.run import provenance
from nemotron.run.folder import RunFolder
from nemotron.run.log import RunLog
from nemotron.run.metrics import read_metrics
from nemotron.run.provenance import Facts
from nemotron.run.signals import StopRequest
from nemotron.run.trackers import TrackedRun
from nemotron.train.reliability.faults import describe as describe_fault
from nemotron.train.setup import Content, Setup
from nemotron.train.trainer import Trainer
from nemotron.train.tuning import trained_shares


def announce(setup: Setup, folder: RunFolder, log: RunLog, origin: Facts) -> TrackedRun:
    """Write what the run is to its folder and the screen; returns what trackers get of it."""
    trainer = setup.trainer
    config, ranks = trainer.config, trainer.ranks
    if ranks.is_first:
        _write_description(config.model, setup.content, folder)
    count = count_parameters(config.model)
    sizes = {"parameters": count.total, "active": count.active, "mtp": count.mtp}
    facts = provenance.collect(trainer.device)
    facts |= {**origin, "seed": config.seed, **sizes}
    facts["matmul_peak_flops"] = trainer.peak_flops
    dtype, documents = DTYPES[config.precision.compute], config.data.reset_documents
    choices = choose_backends(config.ops, trainer.device, dtype, documents)
    facts["backends"] = {choice.operation: choice.facts() for choice in choices}
    facts["ranks"] = ranks.world
    run_id = ""
    if ranks.is_first:
        entries = provenance.with_start(folder.provenance, trainer.state.step, facts)
        folder.write(folder.provenance, entries.model_dump(exclude_none=True))
        run_id = entries.id
    log.info(f"run        {folder.path} ({trainer.device}, {config.precision.compute})")
    if trainer.mesh is not None:
        log.info(f"ranks      {trainer.mesh.describe()}")
    for fault in config.reliability.faults:
        log.info(f"warning    a fault is injected: {describe_fault(fault)}")
    log.info(f"model      {count.line}")
    for line in describe_backends(choices):
        log.info(f"operations {line}")
    if config.precision.quantizes:
        table = trainer.quantization.table
        if ranks.is_first:
            folder.write_precision([asdict(line) for line in table])
        for line in summarize(table):
            log.info(f"precision  {line}")
    for line in trained_shares(config.model, config.tuning):
        log.info(f"tuning     {line}")
    for line in setup.content.describe():
        log.info(f"data       {line}")
    if ranks.is_first and (jump := _change_of_rate(trainer, folder)) is not None:
        log.info(f"warning    {jump}")
    log.info(
        f"training   {trainer.plan.num_steps:,} steps, "
        f"{trainer.plan.timeline.num_tokens:,} tokens; matrix products reach "
        f"{trainer.peak_flops / 1e9:,.0f} GFLOP/s here"
    )
    return TrackedRun(
        project=config.logging.project,
        name=config.name,
        id=run_id,
        folder=folder.path,
        step=trainer.state.step,
        config=config.model_dump(mode="json"),
    )


def _change_of_rate(trainer: Trainer, folder: RunFolder) -> str | None:
    """Return a warning if the learning rate jumps from that of the steps so far."""
    plan, start = trainer.plan, trainer.state.step
    if not start or not folder.metrics.exists():
        return None
    records = (record for record in read_metrics(folder.metrics) if record.get("kind") == "train")
    done = [r for r in records if isinstance(r.get("lr"), float) and int(r["step"] or 0) <= start]
    if not done or done[-1]["lr"] == plan.lr(int(done[-1]["step"] or 0) - 1):
        return None
    return (
        f"the schedule is not that of the steps so far: the learning rate was "
        f"{done[-1]['lr']:.2e} at step {done[-1]['step']}, and goes on with {plan.lr(start):.2e} "
        f"at step {start + 1}"
    )


def announce_results(trainer: Trainer, folder: RunFolder, log: RunLog, how: str) -> None:
    """Say what the run came to, where it lies, and what can be done with it."""
    state = trainer.state
    bits = log.validation.get("validation/bits_per_byte")
    quality = f", validation {bits:.3f} bits per byte" if isinstance(bits, float) else ""
    for line in (
        f"{how}: {state.step:,} steps, {state.tokens:,} tokens{quality}",
        f"  metrics      {folder.metrics}",
        f"  checkpoint   {folder.checkpoints / folder_name(state.step)}",
        "next:",
        *(f"  {command}" for command in _next(trainer, folder)),
    ):
        log.info(line)


def _next(trainer: Trainer, folder: RunFolder) -> list[str]:
    """Return commands that use the model."""
    if trainer.config.stage == "correct":
        files = ("--in", "nbest.jsonl", "--out", "fixed.jsonl")
        return [_command("correct", folder.path, *files)]
    if folder.chat_template.is_file():
        use = _command("chat", folder.path)
    else:
        use = _command("generate", folder.path, "--prompt", "Once upon a time")
    return [
        use,
        _command("export", folder.path, "--out", folder.path / "export"),
    ]


def announce_stop(trainer: Trainer, folder: RunFolder, log: RunLog, stop: StopRequest) -> str:
    """Print why and where the run stopped, and how to resume it; returns why.

    Every rank must call it: one that was not asked itself learns who was.
    """
    step, num_steps = trainer.state.step, trainer.plan.num_steps
    reasons = trainer.ranks.gather(stop.reason(step))
    elsewhere = (f"{asked} on rank {rank}" for rank, asked in enumerate(reasons) if asked)
    reason = reasons[trainer.ranks.rank] or next(elsewhere)
    log.info(f"stopped by {reason} after step {step} of {num_steps}, saved")
    world = trainer.ranks.world
    how = f"start the {world} ranks again, each with: " if world > 1 else ""
    log.info(f"go on: {how}{_command('train', folder.path, '--resume')}")
    return reason


def announce_failure(log: RunLog, problem: Exception | str, saved_step: int | None) -> None:
    """Say what the run failed of, and what is left of it."""
    log.info(f"failed: {problem}")
    if saved_step is not None:
        log.info(f"the newest checkpoint is {folder_name(saved_step)}")


def _write_description(model: ModelConfig, content: Content, folder: RunFolder) -> None:
    folder.write_description(content.tokenizer.content)
    if content.has_conversations:
        tokenizer = content.tokenizer
        ends = dict.fromkeys([model.eos_token_id, tokenizer.id(TURN_END)])
        named = {"bos_token_id": model.bos_token_id, "pad_token_id": model.pad_token_id}
        # with a foreign tokenizer, the configuration's numbers may be those of ordinary tokens
        others = {key: token for key, token in named.items() if token in tokenizer.special_ids}
        folder.write_chat_files(TEMPLATE, list(ends), others)


def _command(*arguments: str | Path) -> str:
    return shlex.join([*_program(), *map(str, arguments)])


def _program() -> list[str]:
    """Return how this program can be started again from the same folder."""
    if Path(sys.argv[0]).name == "nemotron":
        on_path = shutil.which("nemotron")
        same = on_path is not None and Path(on_path).samefile(sys.argv[0])
        return ["nemotron" if same else sys.argv[0]]
    return [sys.executable, "-m", "nemotron"]
