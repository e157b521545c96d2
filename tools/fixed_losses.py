"""Train a few steps on a fixed seed in many settings, and see whether a change moved a bit.

    python tools/fixed_losses.py --out before.json            # at the old commit
    python tools/fixed_losses.py --compare before.json        # at the new one

Each case is a run of `nemotron train` in a process of its own, on one core per rank: the recipes
smoke, tiny and nano in each number format, on one process and on two ranks of each kind. What it
logged about losses and gradients is kept with all its digits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = {
    "smoke": ROOT / "recipes/tiny/smoke.yaml",
    "tiny": ROOT / "recipes/tiny/pretrain.yaml",
    "nano": ROOT / "recipes/tiny/nano.yaml",
}
FORMATS = ("fp32", "bf16", "nvfp4")
LAYOUTS = {
    "dp2": ["parallel.dp_shard=2"],
    "pp2": ["parallel.pp=2"],
    "ep2": ["parallel.dp_shard=2", "parallel.ep=2"],
}
"""Settings of two ranks."""

SMALL = ["data.seq_len=64", "batch.global_tokens=256", "batch.micro_batch=2"]
SHORT = ["schedule.warmup_steps=2", "schedule.decay_steps=2"]
EVALUATION = ["evaluation.every_steps=5", "evaluation.tokens=512"]
KEPT = ("loss/", "grad_norm/", "validation/")
"""Beginnings of the metrics that are compared."""

Losses = dict[str, list[dict[str, float | str]]]
"""For each case, the kept values of each line of its metrics."""


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    world: int = 1


def cases() -> list[Case]:
    found = []
    for recipe, path in RECIPES.items():
        for form in FORMATS:
            words = f"precision={form}"
            found.append(Case(f"{recipe} {form}", path, (words,)))
            found += [
                Case(f"{recipe} {form} {layout}", path, (words, *dims), world=2)
                for layout, dims in LAYOUTS.items()
            ]
    return found


def train(case: Case, steps: int, folder: Path) -> list[dict[str, float | str]]:
    """Run a case and return what it logged.

    Raises:
        SystemExit: when the run failed, with what it said.
    """
    run = folder / case.name.replace(" ", "-")
    launcher = ["-m", "nemotron"]
    if case.world > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.world}"]
        launcher += ["-m", "nemotron"]
    overrides = [*SMALL, *SHORT, *EVALUATION, *case.overrides, f"schedule.total_steps={steps}"]
    overrides += ["device=cpu", f"name={run.name}", f"output={folder}", f"data.cache={folder}/data"]
    finished = subprocess.run(
        [sys.executable, *launcher, "train", str(case.recipe), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise SystemExit(f"{case.name} failed:\n{finished.stdout}{finished.stderr}")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = (*KEPT, "step", "kind")
    return [{k: v for k, v in json.loads(line).items() if k.startswith(kept)} for line in lines]


def differences(before: Losses, after: Losses) -> list[str]:
    """Return a line for each case of both that differs, with the first value that does."""
    found = []
    for name in after:
        if name not in before:
            found.append(f"{name}: not in the file")
            continue
        if len(before[name]) != len(after[name]):
            found.append(f"{name}: {len(before[name])} lines before, {len(after[name])} after")
        for old, new in zip(before[name], after[name], strict=False):
            if old != new:
                key = next(k for k in (old | new) if old.get(k) != new.get(k))
                where = f"{old['kind']} {key} of step {old['step']}"
                found.append(f"{name}: {where} was {old.get(key)}, is {new.get(key)}")
                break
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --out")
    options = parser.parse_args()
    losses: Losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if options.only in case.name:
                losses[case.name] = train(case, options.steps, Path(folder))
                print(f"{case.name}: loss {losses[case.name][-2]['loss/total']!r}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(losses, indent=1) + "\n")
    if not options.compare:
        return 0
    found = differences(json.loads(options.compare.read_text()), losses)
    print("\n".join(found) or f"{len(losses)} runs of {options.steps} steps: equal to the bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
