"""A small pre-trained run, conversations, and recipes that fine-tune the one on the others."""

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from nemotron.cli import run
from tests.support.conversations import GARDEN, GARDEN_TOOLS
from tests.support.embedded import fill_cache
from tests.support.tiny_run import MODEL

SEQ_LEN = 161


def chats() -> list[dict[str, Any]]:
    """Conversations of different lengths: short ones, ones with reasoning, one with tools."""
    rows: list[dict[str, Any]] = [{"messages": GARDEN, "tools": GARDEN_TOOLS}]
    for number in range(40):
        answer = {"role": "assistant", "content": f"It is {2 * number}." + " So." * (number % 7)}
        if number % 3 == 0:
            answer["reasoning_content"] = "I add."
        question = {"role": "user", "content": f"What is {number} and {number}?"}
        rows.append({"messages": [question, answer] * (1 + number % 2)})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    with open(path, "w") as file:
        YAML(typ="safe").dump(values, file)
    return path


class Workplace:
    """A folder with a pre-trained run `base` and the file `chats.jsonl`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, folder / "runs"
        self.chats = write_rows(folder / "chats.jsonl", chats())
        fill_cache(folder / "cache")
        values = {
            **self.common("base"),
            "data": {"seq_len": 64, "cache": str(folder / "cache")},
            "batch": {"global_tokens": 512, "micro_batch": 4},
            "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 4},
            "evaluation": {"tokens": 64},
        }
        assert run(["train", str(write_recipe(folder / "base.yaml", values))]) == 0

    def common(self, name: str) -> dict[str, Any]:
        """Return what every recipe here has."""
        return {"name": name, "output": str(self.runs), "device": "cpu", "model": MODEL}

    def values(self, name: str, **changes: Any) -> dict[str, Any]:
        """Return the values of a recipe of stage sft; mappings are merged into its sections."""
        values: dict[str, Any] = {
            **self.common(name),
            "stage": "sft",
            "init_from": str(self.runs / "base"),
            "data": {
                "sources": [{"name": "chats", "path": str(self.chats)}],
                "cache": str(self.folder / "cache"),
                "seq_len": SEQ_LEN,
                "validation_fraction": 0.2,
            },
            "batch": {"global_tokens": 4 * SEQ_LEN, "micro_batch": 2},
            # AdamW's first steps with a small eps make a whole step of any rounding of a gradient
            "optimizer": {"eps": 1e-2},
            "schedule": {"kind": "constant", "peak": 1e-2, "total_steps": 4},
            "evaluation": {"tokens": 4 * SEQ_LEN},
        }
        for key, given in changes.items():
            known = values.get(key)
            merges = isinstance(known, dict) and isinstance(given, dict)
            values[key] = {**known, **given} if merges else given
        return values

    def recipe(self, name: str, **changes: Any) -> Path:
        """Write such a recipe."""
        return write_recipe(self.folder / f"{name}.yaml", self.values(name, **changes))

    def train(self, name: str, *arguments: str, **changes: Any) -> Path:
        """Run such a recipe to its end; returns the folder of the run."""
        code = run(["train", str(self.recipe(name, **changes)), *arguments])
        assert code == (75 if any("stop" in word for word in arguments) else 0)
        return self.runs / name
