"""Provenance of a run: versions, code, machine, command line; one entry per start."""

import datetime
import functools
import importlib.metadata
import os
import platform
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import JsonValue, ValidationError

from nemotron.checkpoint.manifest import code_version
from nemotron.errors import UserError
from nemotron.files import read_regular, write_json
from nemotron.run.redaction import redact, redact_arguments
from nemotron.section import Section

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "numpy", "tokenizers", "pydantic", "mamba-ssm", "causal-conv1d", "flash-attn")
"""Packages whose versions can change a result."""

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY")
"""Environment variables that can change a result's last bits; no others are recorded."""

Facts = dict[str, Any]  # Any: nested JSON


class Provenance(Section):
    """The content of `provenance.json`."""

    id: str
    """Of the run, drawn once."""
    starts: list[dict[str, JsonValue]]
    imported: dict[str, JsonValue] | None = None
    merged: dict[str, JsonValue] | None = None


def with_start(path: Path, step: int, facts: Facts) -> Provenance:
    """Return the entries of a run's starts with one more, for this start.

    Raises:
        UserError: when the entries of earlier starts cannot be read.
    """
    first = Provenance(id=secrets.token_hex(4), starts=[])
    known = read_provenance(path) if path.exists() else first
    known.starts.append(redact({"time": _now(), "step": step} | facts))
    return known


def record_import(path: Path, facts: Facts) -> Facts:
    """Write where a run that was never started comes from; returns that, with the time."""
    return _record_origin(path, "imported", facts)


def record_merge(path: Path, facts: Facts) -> Facts:
    """Write which checkpoints a run is an average of; returns that, with the time."""
    return _record_origin(path, "merged", facts)


def _record_origin(path: Path, kind: str, facts: Facts) -> Facts:
    origin = {"time": _now()} | facts
    write_json(path, {"id": secrets.token_hex(4), "starts": [], kind: origin})
    return origin


def collect(device: "torch.device") -> Facts:
    """Return what is known about code, versions and machine."""
    import torch  # who only reads provenance does without it

    return {
        "argv": redact_arguments(sys.argv),
        "folder": os.getcwd(),
        "code": {"nemotron-train": code_version(), **_commit()},
        "versions": versions(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "cpu": _cpu_name(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": _device_name(device),
        },
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def read_provenance(path: Path) -> Provenance:
    """Return the entries of a run's starts.

    Raises:
        UserError: when they cannot be read.
    """
    try:
        return Provenance.model_validate_json(read_regular(path))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, problem["loc"])) or "the content"
        raise UserError(
            f"{key}: {problem['msg']}; restore it or move it away.", where=str(path)
        ) from None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _commit() -> dict[str, str | bool]:
    """Return the commit of the source folder, when the package runs from a git checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    commit, changes = (
        subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    if commit.returncode:
        return {}
    return {"commit": commit.stdout.strip(), "uncommitted_changes": bool(changes.stdout.strip())}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _device_name(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
