"""Kill a training run again and again, also inside its saves, and see whether a bit is lost.

A run is trained once undisturbed. A second one is killed by SIGKILL at random moments, every
other time while a checkpoint is being written, committed or removed; each next start resumes.
At the end the two must agree in every tensor and every logged number. With `--stage rl` the
kills come while answers are written, judged and learned from, and rollout files must agree, too.

    python tools/kill_test.py --kills 30 --seed 1
    python tools/kill_test.py --stage rl --kills 10 --steps 60
"""

import argparse
import itertools
import multiprocessing
import os
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nemotron.checkpoint.find import SAVING, newest  # noqa: E402
from nemotron.checkpoint.housekeeping import REMOVING as REMOVED  # noqa: E402
from nemotron.checkpoint.manifest import CheckpointInfo  # noqa: E402
from nemotron.checkpoint.read import SavedTensors, read_state  # noqa: E402
from nemotron.posttrain.answering import Answerer  # noqa: E402
from nemotron.posttrain.config import RlConfig  # noqa: E402
from nemotron.posttrain.stage import Reinforcement  # noqa: E402
from nemotron.posttrain.verify import Verifiers  # noqa: E402
from nemotron.run.metrics import read_metrics  # noqa: E402
from nemotron.train.config import PretrainConfig  # noqa: E402
from nemotron.train.start import train  # noqa: E402
from nemotron.train.trainer import Trainer  # noqa: E402

FORKED = multiprocessing.get_context("forkserver")
"""Starts are forked from a server that has imported all this: it takes most of a short run."""

RECIPE: dict[str, Any] = {  # Any: as in a YAML file
    "device": "cpu",
    "model": {
        "vocab_size": 4096,
        "hidden_size": 32,
        "hybrid_override_pattern": "ME*-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "moe_latent_size": 16,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
    },
    "optimizer": {"betas": [0.9, 0.95]},
    "checkpoint": {"every_steps": 1, "keep": 2},
}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {
        "batch": {"global_tokens": 192, "micro_batch": 2},
        "evaluation": {"every_steps": 5, "tokens": 512},
    },
    "rl": {
        "stage": "rl",
        "rollout": {
            "environments": [{"name": "arith_chain"}],
            "prompt": "text",
            "num_prompts_per_step": 8,
            "num_generations_per_prompt": 4,
            "updates_per_step": 2,
            "max_new_tokens": 6,
            "truncated": "keep",
            "verify_timeout_s": 100.0,  # a busy machine takes its time
            "evaluation_tasks": 8,
        },
        "advantage": {"baseline": "none"},  # all answers are wrong, and yet something is learned
        "batch": {"global_tokens": 16 * 48, "micro_batch": 4},
        "evaluation": {"every_steps": 20},
    },
}

MOMENTS = (
    *("created", "rank-00000.safetensors", "model.json", "state.json", "index.json"),
    "manifest.json",
)
"""What to wait for inside a checkpoint that is being written, before the kill."""
COMMITTED, REMOVING, ANYTIME = "committed", "removing", "anytime"
PHASES = {"answering": (Answerer, "answer"), "judging": (Verifiers, "verify")}
PHASES |= {"updating": (Trainer, "update")}
"""Methods inside which a run with rewards is killed, in one of its first steps."""

MEASURED = ("perf/", "mem/", "ranks/", "rl/rollout_s", "rl/verify_s", "rl/score_s")
"""Metrics that depend on the clock and the machine's load."""


def main() -> int:
    """Run the test; returns 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of the run")
    parser.add_argument("--stage", choices=STAGES, default="pretrain")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return kill_test(options, options.folder or Path(temporary))


def kill_test(options: argparse.Namespace, folder: Path) -> int:
    """Train undisturbed and disturbed, print a line for each kill, compare."""
    draw = random.Random(options.seed)
    whole, killed = (recipe(folder, name, options) for name in ("whole", "killed"))
    start = time.monotonic()
    if end_of(start_worker(whole)) != 0:
        print("the undisturbed run failed")
        return 1
    per_step = (time.monotonic() - start) / options.steps
    print(
        f"{'kill':>4}  {'moment':<14} {'after step':>10}  {'checkpoints left behind'}", flush=True
    )
    run = folder / "killed"
    anywhere = [ANYTIME] * 6 + [COMMITTED, REMOVING, *MOMENTS]
    phases = itertools.cycle(PHASES)
    for number in range(1, options.kills + 1):
        moment = next(phases) if options.stage == "rl" else draw.choice(anywhere)
        if moment in PHASES:
            process = start_worker(killed, moment, draw.randrange(4))
            kill_inside(process, folder / moment, draw, per_step)
        else:
            process = start_worker(killed)
            kill(process, run / "checkpoints", moment, draw, per_step)
        if process.exitcode != -9:
            print(f"{number:>4}  the run ended by itself; give it more --steps")
            return 1
        print(f"{number:>4}  {moment:<14} {last_step(run):>10}  {listing(run)}", flush=True)
    if end_of(start_worker(killed)) != 0:
        print("the last start failed")
        return 1
    problems = differences(folder / "whole", run)
    print("; ".join(problems) or f"{options.kills} kills; every tensor and logged number is equal")
    return 1 if problems else 0


def recipe(folder: Path, name: str, options: argparse.Namespace) -> dict:
    """Return the recipe of one of the two runs."""
    steps = options.steps
    schedule = {"peak": 1e-2, "total_steps": steps, "warmup_steps": 2, "decay_steps": steps // 2}
    data = {"cache": str(folder / "cache"), "seq_len": 48}
    own = {"name": name, "output": str(folder), "schedule": schedule, "data": data}
    return RECIPE | STAGES[options.stage] | own


def start_worker(config: dict, phase: str | None = None, calls: int = 0) -> BaseProcess:
    """Start or resume a run in a process of its own.

    With a phase it leaves a file of that name when it has been there `calls` times and comes again.
    """
    os.environ["PYTHONPATH"] = str(ROOT)  # of the server, which begins with the first process
    FORKED.set_forkserver_preload(["nemotron.train.start", "nemotron.posttrain.stage"])
    process = FORKED.Process(target=work, args=(config, phase, calls))
    process.start()
    return process


def work(config: dict, phase: str | None, calls: int) -> None:
    """Train to the end, in silence; the exit code says how it ended."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
    torch.set_num_threads(1)
    if phase is not None:
        mark(phase, calls, Path(config["output"]) / phase)
    if config.get("stage") == "rl":
        sys.exit(train(RlConfig.model_validate(config), Reinforcement(), resume=True))
    sys.exit(train(PretrainConfig.model_validate(config), resume=True))


def mark(phase: str, calls: int, path: Path) -> None:
    """Have a method leave a file when it is called for the time that is asked for."""
    owner, name = PHASES[phase]
    method, left = getattr(owner, name), itertools.count(calls, -1)

    def marked(*given: Any, **named: Any) -> Any:  # Any: as the method
        if next(left) == 0:
            path.touch()
        return method(*given, **named)

    setattr(owner, name, marked)


def end_of(process: BaseProcess) -> int | None:
    """Wait for the end; returns the exit code."""
    process.join()
    return process.exitcode


def kill(
    process: BaseProcess, folder: Path, moment: str, draw: random.Random, per_step: float
) -> None:
    """Wait for the moment, and a little longer, then kill."""
    before = names(folder)
    if moment == ANYTIME:
        # from the reading of the checkpoint to some steps into the training
        time.sleep(draw.uniform(0, 8 * per_step))
    else:
        while process.exitcode is None and not reached(folder, moment, before):
            time.sleep(0.0005)  # a busy loop would take the run's core
        time.sleep(draw.uniform(0, 0.004))
    process.kill()
    process.join()


def kill_inside(process: BaseProcess, path: Path, draw: random.Random, per_step: float) -> None:
    """Wait for the file that says that a phase began, and a little longer, then kill."""
    while process.exitcode is None and not path.exists():
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, per_step / 4))
    process.kill()
    process.join()
    path.unlink(missing_ok=True)


def reached(folder: Path, moment: str, before: set[str]) -> bool:
    """Say whether a save of this start is at the moment."""
    for name in names(folder) - before:
        if moment == COMMITTED and name[5:].isdigit():
            return True
        if moment == REMOVING and name.startswith(REMOVED):
            return True
        if name.startswith(SAVING) and (moment == "created" or (folder / name / moment).exists()):
            return True
    return False


def names(folder: Path) -> set[str]:
    """Return what lies in the checkpoints folder."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def listing(run: Path) -> str:
    """Describe what a kill left in the checkpoints folder."""
    folder = run / "checkpoints"
    files = {n: sorted(os.listdir(folder / n)) for n in sorted(names(folder))}
    return ", ".join(
        n if n[5:].isdigit() else f"{n} ({len(content)} files)" for n, content in files.items()
    )


def last_step(run: Path) -> int:
    """Return the last step in the metrics."""
    metrics = run / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.exists() else []
    return int(records[-1]["step"] or 0) if records else 0


def differences(run: Path, other: Path) -> list[str]:
    """Return what differs between two runs: tensors, counters, metrics."""
    infos = [newest_of(folder / "checkpoints") for folder in (run, other)]
    first, second = (all_tensors(info) for info in infos)
    problems = [n for n in first if n not in second or not torch.equal(first[n], second[n])]
    if first.keys() != second.keys():
        problems.append("names of tensors")
    if read_state(infos[0]) != read_state(infos[1]):
        problems.append("state.json")
    if computed_metrics(run) != computed_metrics(other):
        problems.append("metrics.jsonl")
    if rollouts(run) != rollouts(other):
        problems.append("rollouts")
    more = [f"{len(problems) - 5} more"] if len(problems) > 5 else []
    return [f"{problem} differs" for problem in problems[:5]] + more


def newest_of(folder: Path) -> CheckpointInfo:
    """Return the newest whole checkpoint of a folder that has one."""
    found = newest(folder)
    assert found.info is not None, found.skipped
    return found.info


def rollouts(run: Path) -> dict[str, bytes]:
    """Return the content of every rollout file."""
    return {path.name: path.read_bytes() for path in (run / "rollouts").glob("*.jsonl")}


def all_tensors(info: CheckpointInfo) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint."""
    saved = SavedTensors(info)
    tensors = saved.empty()
    saved.load(tensors)
    return tensors


def computed_metrics(run: Path) -> list[dict]:
    """Return the metrics without what was measured by a clock."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(MEASURED)} for r in records]


if __name__ == "__main__":
    sys.exit(main())
