"""Pictures of a blend: lengths of documents, and the share of each source."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemotron.data.loader import TrainingData
from nemotron.errors import UserError

if TYPE_CHECKING:
    from nemotron.data.inspect import Statistics

MOST_SOURCES = 20


def draw(data: TrainingData, found: "Mapping[str, Statistics]", folder: Path) -> list[Path]:
    """Write `lengths.png` and `shares.png` into a folder.

    Raises:
        UserError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--plots needs matplotlib; install it with: pip install matplotlib."
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    lengths = Figure(figsize=(8, 4.5), layout="constrained")
    axes = lengths.subplots()
    for name, facts in list(found.items())[:MOST_SOURCES]:
        if len(facts.lengths):
            counts, edges = np.histogram(np.log2(np.maximum(facts.lengths, 1)), bins=40)
            axes.stairs(counts / counts.sum(), 2**edges, label=name)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="share of the documents")
    axes.legend()
    shares = Figure(figsize=(8, 4.5), layout="constrained")
    axes = shares.subplots()
    read = data.tokens_read(data.timeline.num_steps)
    largest = sorted(read, key=lambda name: -read[name])[:MOST_SOURCES]
    axes.barh(largest, [read[name] / max(1, sum(read.values())) for name in largest])
    axes.invert_yaxis()
    axes.set(xlabel="share of the run's tokens")
    paths = [folder / "lengths.png", folder / "shares.png"]
    for figure, path in zip((lengths, shares), paths, strict=True):
        figure.savefig(path, dpi=120)
    return paths
