"""Stage 8: the command line: the smoke recipe in every format, resume, generate, parity, RL."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from stage import ROOT, Stage, parser

PRECISIONS = ("fp32", "bf16", "fp8_current", "fp8_block", "nvfp4")
WIDE = (
    "model.hidden_size=128",
    "model.mamba_num_heads=16",
    "model.moe_latent_size=128",
    "model.moe_intermediate_size=128",
    "model.moe_shared_expert_intermediate_size=128",
)
"""Widths that products of 8 bits can take."""
RESUMED = ("fp8_current", "nvfp4")
LEARN = """\
extends: {root}/recipes/tiny/smoke.yaml
stage: rl
name: rl
output: {runs}
init_from: {runs}/{first}
device: {device}
precision: bf16
rollout:
  environments: [{{name: arith_chain, level: 0}}]
  prompt: text
  num_prompts_per_step: 4
  num_generations_per_prompt: 4
  max_new_tokens: 8
  truncated: keep
  evaluation_tasks: 4
batch: {{global_tokens: 1024, micro_batch: 4}}
remove: [evaluation.tokens, schedule.warmup_fraction]
schedule: {{kind: constant, peak: 1.0e-3, total_steps: 4}}
"""
"""Reinforcement learning on the first run's weights."""
STOPPED = 75
"""Exit code of a run that was asked to stop."""


def main() -> None:
    stage = Stage("cli", parser(__doc__).parse_args())
    with tempfile.TemporaryDirectory() as runs:
        _run(stage, Path(runs))


def _run(stage: Stage, runs: Path) -> None:
    chosen = PRECISIONS[1:3] if stage.tiny else PRECISIONS
    trained = {name: _train(stage, runs, name, ["--stop-at", "3"]) for name in chosen}
    for name, process in trained.items():
        _emit(stage, f"train {name}", process, STOPPED, runs / name)
    started = {name: _train(stage, runs, name, ["--resume"]) for name in RESUMED if name in chosen}
    words = ["generate", str(runs / chosen[0]), "--prompt", "def read(", "--max-new-tokens", "8"]
    words += ["--temperature", "0", "--device", stage.device.type]
    generated = _start(stage, "generate", words)
    device = stage.device.type
    words = ["check-parity", str(runs / chosen[0]), "--device", device, "--length", "40"]
    compared = _start(stage, "parity", words)
    recipe = runs / "rl.yaml"
    recipe.write_text(LEARN.format(root=ROOT, runs=runs, first=chosen[0], device=device))
    learned = _start(stage, "rl", ["train", str(recipe)])
    for name, process in started.items():
        _emit(stage, f"resume {name}", process, 0, runs / name)
    _emit(stage, f"generate {chosen[0]}", generated, 0, None)
    _emit(stage, f"check-parity {chosen[0]}", compared, 0, None)
    _emit(stage, "rl", learned, 0, runs / "rl")


def _train(stage: Stage, runs: Path, name: str, words: list[str]) -> subprocess.Popen[bytes]:
    changes = [f"device={stage.device.type}", f"precision={name}", f"output={runs}", f"name={name}"]
    if name not in ("fp32", "bf16"):
        # presets leave the two blocks at either end alone, which are all that the recipe has
        changes += [f"precision.rules=[{{kind: '*', format: {name}}}]", *WIDE]
    command = ["train", "recipes/tiny/smoke.yaml", *changes, *words]
    return _start(stage, f"{name}_{words[0].strip('-')}", command)


def _start(stage: Stage, log: str, words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "nemotron", *words],
        cwd=ROOT,
        stdout=(stage.out / f"cli_{log}.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


def _emit(
    stage: Stage, case: str, process: subprocess.Popen[bytes], expected: int, run: Path | None
) -> None:
    try:
        code: int | str = process.wait(timeout=max(1.0, stage.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        code = "no end in time"
    values: dict[str, object] = {"exit_code": code}
    if run is not None and (run / "metrics.jsonl").exists():
        lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
        lines = [line for line in lines if line.get("kind") == "train"]
        newest = lines[-1] if lines else {}
        names = ("loss/main", "rl/reward", "rl/token_mult_prob_error")
        values |= {"steps": len(lines), **{n: newest[n] for n in names if n in newest}}
    flag = "" if code == expected else "WRONG"
    stage.emit(case, **values, flag=flag)


if __name__ == "__main__":
    main()
