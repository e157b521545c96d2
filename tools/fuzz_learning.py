"""What the fuzzer damages of runs that learn from rewards and preferences, and their inputs."""

import random
from pathlib import Path

import fuzz_mutations as mutate
import fuzz_readers as direct
import fuzz_requests as read
from fuzz_target import Target, forge_manifest, of_recipe
from fuzz_world import PLAYED

DPO = ["train", "dpo.yaml", "name=new"]
PIVOTS = ["rl", "pivots", "pivot.yaml", "trajectories.jsonl", "--model", "runs/mine", "--samples",
          "2", "--out", "pivots.jsonl"]  # fmt: skip


def of_played(file: str) -> Target:
    """Of the checkpoint of a run that learns from rewards."""

    def seal(world: Path, draw: random.Random) -> None:
        forge_manifest(world, draw, PLAYED)

    commands = [["train", "runs/played", "--resume", "--stop-at", "2"],
                ["generate", "runs/played", "--prompt", "x", "--max-new-tokens", "2"]]  # fmt: skip
    reads = direct.records("runs/played")
    return Target(
        f"{PLAYED}/{file}", mutate.of_json, commands, ("runs/played",), seal, direct=reads
    )


LEARNING: dict[str, Target] = {
    "rl recipe": Target(
        "rl.yaml", of_recipe, [["rl.yaml"]], ("tasks.jsonl",), reader=read.draw_tasks
    ),
    "tasks": Target(
        "tasks.jsonl", mutate.of_lines, [["rl.yaml"]], ("rl.yaml",), reader=read.draw_tasks
    ),
    "environment request": Target(
        "judged.jsonl", mutate.of_lines, [["judged.jsonl"]], reader=read.judge
    ),
    "rollouts": Target(
        "runs/played/rollouts/step-00000000.jsonl",
        mutate.of_lines,
        [["rl", "reverify", "runs/played"], ["rl", "reverify", "runs/played", "--out", "again"]],
        ("runs/played",),
        direct=direct.rollouts,
    ),
    "rl state": of_played("state.json"),
    "dpo recipe": Target(
        "dpo.yaml", of_recipe, [["recipe", "check", "dpo.yaml"], [*DPO, "--dry-run"]],
        ("runs/mine", "preferences.jsonl"), direct=direct.recipe("dpo.yaml"),
    ),
    "preferences": Target(
        "preferences.jsonl", mutate.of_lines,
        [[*DPO, "--dry-run"], [*DPO, "--stop-at", "1"]], ("dpo.yaml", "runs/mine"),
        direct=direct.preferences,
    ),
    "trajectories": Target(
        "trajectories.jsonl", mutate.of_lines, [PIVOTS], ("pivot.yaml", "runs/mine"),
        is_refused=True,  # the answers are never right
        direct=direct.turns,
    ),
}  # fmt: skip
