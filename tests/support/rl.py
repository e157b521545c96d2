"""A small recipe of reinforcement learning."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support.tiny_run import MODEL

VALUES: dict[str, Any] = {
    "stage": "rl",
    "device": "cpu",
    "model": MODEL,
    "data": {"seq_len": 47},
    "rollout": {
        "environments": [{"name": "arith_chain"}, {"name": "mcqa", "weight": 0.5}],
        "prompt": "text",
        "num_prompts_per_step": 4,
        "num_generations_per_prompt": 3,
        "max_new_tokens": 6,
        "evaluation_tasks": 3,
        "truncated": "keep",
    },
    "batch": {"global_tokens": 4 * 3 * 47, "micro_batch": 3},
    "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 4},
    "optimizer": {"betas": [0.9, 0.999]},
}


def rl_values(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe's values; keyword arguments replace or add keys of sections."""
    values = dict(VALUES)
    for section, given in changes.items():
        values[section] = {**values.get(section, {}), **given}
    return values


def write_recipe(folder: Path, name: str, values: dict[str, Any]) -> Path:
    """Write a recipe of this name, whose run lies in `folder`/runs; returns its path."""
    path = folder / f"{name}.yaml"
    with open(path, "w") as file:
        YAML(typ="safe").dump({**values, "name": name, "output": str(folder / "runs")}, file)
    return path
