"""Texts that a model wrote: answers of a reinforcement run, or continuations of prompts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nemotron.files import open_regular, parse_json

Item = TypeVar("Item")

FILES_SHOWN = 4
LINES_SHOWN = 3
"""Of a file of rollouts."""
CHARACTERS = 1500
"""Of a text."""
LONGEST_LINE = 1 << 24
"""Bytes of a rollout that is read."""


@dataclass(frozen=True)
class Sample:
    """A text of a model, and what it answers."""

    step: int
    prompt: str
    text: str
    note: str = ""
    """What a verifier said."""
    is_continuation: bool = False
    """Whether the text continues where the prompt ends."""


def read_rollouts(folder: Path, problems: list[str]) -> list[Sample]:
    """Return the first answers of some rollout files, from the oldest to the newest."""
    if not folder.is_dir():
        return []
    samples = []
    for path in spread(sorted(folder.glob("step-*.jsonl")), FILES_SHOWN):
        digits = path.stem.removeprefix("step-")
        if not digits.isdecimal():
            continue
        try:
            with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
                lines = [file.readline(LONGEST_LINE) for _ in range(LINES_SHOWN)]
            samples += [_sample(int(digits), parse_json(line)) for line in lines if line]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(
                f"{path} is damaged ({type(error).__name__}); its answers are left out."
            )
    return samples


def _sample(step: int, rollout: dict[str, Any]) -> Sample:
    verdict = rollout["verdict"]
    note = f"{rollout['task']['environment']}: reward {verdict['reward']}"
    if verdict.get("error"):
        note += f" (fault of the verifier: {verdict['error']})"
    return Sample(
        step,
        _cut(_text(rollout["task"]["row"])),
        _cut(rollout["response"]["text"]),
        note,
    )


def _text(row: Any) -> str:
    """Return the question of a row as text, whatever form it has."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list):
        return "\n".join(str(m.get("content")) for m in messages if isinstance(m, dict))
    return row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"


def spread(items: Sequence[Item], number: int) -> list[Item]:
    """Return so many items, evenly spread, with the first and the last."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]
