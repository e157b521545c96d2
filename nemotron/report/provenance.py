"""The starts of a run as rows of text: when, how, with which code, on which machine."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron.report.run import Run


@dataclass(frozen=True)
class Change:
    """A setting in which a recipe differs from those that it extends."""

    setting: str
    parent: str
    value: str


@dataclass(frozen=True)
class Start:
    """One start of a run."""

    facts: list[tuple[str, str]] = field(default_factory=list)
    extends: list[str] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    step: int = 0


def describe_starts(run: Run) -> list[Start]:
    """Return the facts of each start; one of an unknown form is shown unchanged."""
    if run.provenance is None:
        return []
    starts = [_start(facts) for facts in run.provenance.starts]
    return [
        replace(start, changes=[]) if before and start.changes == before.changes else start
        for before, start in zip([None, *starts], starts, strict=False)
    ]


def _start(facts: Mapping[str, Any]) -> Start:
    code, machine = _mapping(facts, "code"), _mapping(facts, "machine")
    commit = str(code.get("commit", "unknown"))
    if code.get("uncommitted_changes"):
        commit += ", with uncommitted changes"
    argv = facts.get("argv")
    rows = {
        "time": facts.get("time"),
        "step": facts.get("step"),
        "recipe": facts.get("recipe"),
        "command": shlex.join(map(str, argv)) if isinstance(argv, list) else argv,
        "seed": facts.get("seed"),
        "version": code.get("nemotron-train"),
        "commit": commit,
        "versions": _pairs(_mapping(facts, "versions")),
        "host": machine.get("host"),
        "device": machine.get("device"),
        "processor": f"{machine.get('cpu')}, {machine.get('cpu_count')} cores, "
        f"{machine.get('threads')} threads",
        "ranks": facts.get("ranks"),
        "parameters": _count(facts.get("parameters")),
        "active parameters": _count(facts.get("active")),
        "backends": _pairs(
            {
                name: choice.get("backend") if isinstance(choice, dict) else choice
                for name, choice in _mapping(facts, "backends").items()
            }
        ),
        "environment": _pairs(_mapping(facts, "environment")),
    }
    step, extends = facts.get("step"), facts.get("extends")
    return Start(
        [(name, str(value)) for name, value in rows.items() if value not in (None, "")],
        [*map(str, extends)] if isinstance(extends, list) else [],
        _changes(facts.get("changes")),
        step if isinstance(step, int) else 0,
    )


def _changes(found: Any) -> list[Change]:
    if not isinstance(found, list):
        return []
    keys = ("setting", "parent", "value")
    return [Change(*(str(one.get(k)) for k in keys)) for one in found if isinstance(one, dict)]


def _mapping(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""
