"""Train one small model in each number format from the same seeds and data, and compare.

    python tools/precision_study.py --out study [--seeds 1 2 3] [--steps 300] [--variants ...]

Prints the final validation loss of each variant, relative to bfloat16 at the same seed and, where
an ingredient is left out, to NVFP4 with all of them, each with the standard error of the mean over
the seeds, and draws the differences of the training losses. A run that is
finished is not repeated, so the command can be given again with more seeds or variants.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from nemotron.report.table import Table as Columns
from nemotron.run.metrics import Record, read_metrics

ROOT = Path(__file__).parents[1]
BASE, FULL = "bf16", "nvfp4"
VARIANTS = {
    BASE: ["precision.preset=bf16"],
    "fp8_current": ["precision.preset=fp8_current"],
    "mxfp8": ["precision.preset=mxfp8"],
    "nvfp4": ["precision.preset=nvfp4"],
    "nvfp4, no tail": ["precision.preset=nvfp4", "precision.rules=[{rule}]"],
    "nvfp4, no Hadamard": ["precision.preset=nvfp4", "precision.nvfp4.hadamard=false"],
    "nvfp4, nearest": ["precision.preset=nvfp4", "precision.nvfp4.stochastic_rounding=false"],
    "nvfp4, 1-D weights": ["precision.preset=nvfp4", "precision.nvfp4.square_weights=false"],
}
"""Settings of each variant; without a tail the last blocks are quantized like the others."""
NO_TAIL = (
    "{format: bf16, name: 'mtp.*'}, {format: nvfp4, kind: 'moe.*experts'}, "
    "{format: nvfp4, kind: mamba.in_proj}, {format: mxfp8, kind: mamba.out_proj}"
)
"""Super's assignment to every block of the stack."""
SMOOTHED = 20
"""Steps over which a drawn loss is averaged."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--recipe", default=str(ROOT / "recipes/tiny/smoke.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[tuple[str, int], list[Record]] = {}
    for seed in options.seeds:
        for variant in dict.fromkeys([BASE, *options.variants]):
            runs[variant, seed] = run(options, variant, seed)
            print(f"{variant}, seed {seed}: {final_loss(runs[variant, seed]):.4f}", flush=True)
    report(options, runs)
    draw(options, runs)


def run(options: argparse.Namespace, variant: str, seed: int) -> list[Record]:
    """Train a variant unless it is done; returns its metrics."""
    name = f"{variant.replace(', ', '-').replace(' ', '-')}-{seed}-{options.steps}"
    folder = options.out / "runs" / name
    if not (folder / "finished").exists():
        settings = [setting.replace("{rule}", NO_TAIL) for setting in VARIANTS[variant]]
        command = [sys.executable, "-m", "nemotron", "train", options.recipe, f"name={name}"]
        command += [f"output={options.out}/runs", f"data.cache={options.out}/cache", f"seed={seed}"]
        command += [f"schedule.total_steps={options.steps}", "precision.compute=bf16", *settings]
        command += options.set
        if folder.exists():
            command.append("--resume")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (folder / "finished").touch()
    return read_metrics(folder / "metrics.jsonl")


def values(records: list[Record], kind: str, key: str) -> list[float]:
    """Return the values of a key in the records of a kind."""
    columns = Columns()
    for record in records:
        if record["kind"] == kind:
            columns.add(record)
    found: list[float] = columns.series(key).y.tolist()
    return found


def final_loss(records: list[Record]) -> float:
    return values(records, "validation", "validation/loss")[-1]


def report(options: argparse.Namespace, runs: dict[tuple[str, int], list[Record]]) -> None:
    """Print and store the table."""
    seeds = options.seeds
    table = Table("variant", "loss", *map(str, seeds), "over bf16", "over NVFP4", "step", "memory")
    variants = list(dict.fromkeys(variant for variant, _ in runs))
    losses = {v: [final_loss(runs[v, seed]) for seed in seeds] for v in variants}
    base_seconds, base_memory = costs(runs, BASE, seeds)
    facts = {}
    for variant in variants:
        gaps = relative(losses[variant], losses[BASE])
        seconds, memory = costs(runs, variant, seeds)
        facts[variant] = {
            "losses": losses[variant],
            "gaps": gaps,
            "step_ratio": seconds / base_seconds,
            "memory_ratio": memory / base_memory,
        }
        is_ablation = variant.startswith(f"{FULL}, ") and FULL in losses
        over_full = estimate(relative(losses[variant], losses[FULL])) if is_ablation else ""
        table.add_row(
            variant,
            f"{statistics.fmean(losses[variant]):.4f}",
            *(f"{gap:+.2%}" for gap in gaps),
            estimate(gaps) if variant != BASE else "",
            over_full,
            f"{seconds / base_seconds:.2f}x",
            f"{memory / base_memory:.2f}x",
        )
    Console(width=80 + 9 * len(seeds)).print(table)
    facts_file = options.out / "study.json"
    facts_file.write_text(json.dumps({"seeds": seeds, "variants": facts}, indent=2) + "\n")


def relative(losses: list[float], bases: list[float]) -> list[float]:
    """Return by what share each loss lies above that of the same seed."""
    return [loss / base - 1 for loss, base in zip(losses, bases, strict=True)]


def estimate(gaps: list[float]) -> str:
    """Return the mean over the seeds and its standard error."""
    mean = f"{statistics.fmean(gaps):+.2%}"
    if len(gaps) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.2%}"


def costs(
    runs: dict[tuple[str, int], list[Record]], variant: str, seeds: list[int]
) -> tuple[float, float]:
    """Return the median seconds of a step and the peak memory in GiB, over all seeds."""
    records = [record for seed in seeds for record in runs[variant, seed]]
    seconds = statistics.median(values(records, "train", "perf/step_s"))
    return seconds, max(values(records, "train", "mem/peak_gib"))


def draw(options: argparse.Namespace, runs: dict[tuple[str, int], list[Record]]) -> None:
    """Draw how far each variant's training loss lies from bfloat16's, averaged over the seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(v for v, _ in runs if v != BASE):
        gaps = []
        for seed in options.seeds:
            pairs = zip(losses_of(runs[variant, seed]), losses_of(runs[BASE, seed]), strict=True)
            gaps.append([a / b - 1 for a, b in pairs])
        mean = [statistics.fmean(step) for step in zip(*gaps, strict=True)]
        smooth = [statistics.fmean(mean[max(0, i - SMOOTHED) : i + 1]) for i in range(len(mean))]
        axes.plot(range(1, len(smooth) + 1), [100 * gap for gap in smooth], label=variant)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="step", ylabel="training loss over bfloat16's, %")
    axes.legend()
    figure.savefig(options.out / "losses.png", dpi=120)


def losses_of(records: list[Record]) -> list[float]:
    return values(records, "train", "loss/main")


if __name__ == "__main__":
    main()
