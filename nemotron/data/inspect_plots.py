"""Drawings of data before a run: lengths of documents, and shares of the sources."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemotron.data.loader import TrainingData
from nemotron.errors import UserError
from nemotron.files import naming

SOURCES_DRAWN = 20
DRAWN_BY = "nemotron data inspect"
"""Stands in our drawings, so that those of others are known."""


def draw(data: TrainingData, found: Mapping[str, NDArray[np.int64]], folder: Path) -> list[Path]:
    """Write `lengths.png`, of the documents `found`, and `shares.png` into a folder.

    Raises:
        UserError: when matplotlib is not installed, or the folder cannot be made.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "needs matplotlib; install it with: pip install matplotlib.", key="--plots"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        rule = "is, or lies below, a file; give a folder."
        raise UserError(rule, key="--plots", value=folder) from None
    paths = [folder / "lengths.png", folder / "shares.png"]
    for path in paths:
        if (path.exists() or path.is_symlink()) and not _is_ours(path):
            rule = "was not drawn by nemotron data inspect, so it is kept; give another folder."
            raise UserError(rule, where=str(path))
    lengths = Figure(figsize=(8, 4.5), layout="constrained")
    axes = lengths.subplots()
    for name, tokens in list(found.items())[:SOURCES_DRAWN]:
        if len(tokens):
            counts, edges = np.histogram(np.log2(np.maximum(tokens, 1)), bins=40)
            axes.stairs(counts / counts.sum(), 2**edges, label=name)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="share of the documents")
    axes.legend()
    shares = Figure(figsize=(8, 4.5), layout="constrained")
    axes = shares.subplots()
    read = data.tokens_read(data.timeline.num_steps)
    largest = sorted(read, key=lambda name: -read[name])[:SOURCES_DRAWN]
    axes.barh(largest, [read[name] / max(1, sum(read.values())) for name in largest])
    axes.invert_yaxis()
    axes.set(xlabel="share of the run's tokens")
    for figure, path in zip((lengths, shares), paths, strict=True):
        with naming(path):
            figure.savefig(path, dpi=120, metadata={"Software": DRAWN_BY})
    return paths


def _is_ours(path: Path) -> bool:
    """Say whether a file is a drawing of an earlier call, which names its program at the top."""
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        return DRAWN_BY.encode() in file.read(1 << 12)
