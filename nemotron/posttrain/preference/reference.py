"""Log-probabilities of the reference: computed once with the layout of the run, then stored.

An entry of the cache belongs to the rows of one length of one source, or of its held-out part. It
holds a number for each token of the stream, and which rows are done.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from nemotron.data.batch import NO_LABEL, PLACES, Batch
from nemotron.data.cache import held_cache, map_array, new_entry
from nemotron.files import hash_file, sync, write_json
from nemotron.model.hybrid import HybridLM
from nemotron.model.router import RoutingStats
from nemotron.parallel.local import LocalModel
from nemotron.parallel.runtime import Ranks

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the name of an entry; raise it when its content changes."""
VALUES, ROWS, FACTS = "logprobs.npy", "rows.npy", "facts.json"


@dataclass
class Stored:
    """The log-probabilities of the tokens of one stream, float32, and the rows that are done."""

    folder: Path
    values: NDArray[np.float32]
    rows: NDArray[np.bool_]

    @classmethod
    def open(cls, cache: Path, identity: Sequence[object], tokens: int, rows: int) -> "Stored":
        """Read the entry of that identity; without one, or if it is damaged, nothing is done."""
        digest = xxhash.xxh128_hexdigest(json.dumps([FORMAT, *identity]).encode())
        folder = cache / f"reference-{digest}"
        if _is_whole(folder):
            with contextlib.suppress(ValueError):
                values = map_array(folder / VALUES, np.float32)
                done = np.array(map_array(folder / ROWS, np.bool_))
                if values.shape == (tokens,) and done.shape == (rows,):
                    return cls(folder, values, done)
        return cls(folder, np.zeros(tokens, np.float32), np.zeros(rows, np.bool_))

    def add(self, places: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Take in values; `save` keeps them."""
        if not self.values.flags.writeable:
            self.values = np.array(self.values)
        self.values[places] = values

    def save(self) -> None:
        """Write the entry, whole or not at all, unless another rank has."""
        with held_cache(self.folder.parent):
            if _is_whole(self.folder) and np.array_equal(np.load(self.folder / ROWS), self.rows):
                return
            with new_entry(self.folder) as part:
                for name, array in ((VALUES, self.values), (ROWS, self.rows)):
                    with open(part / name, "wb") as file:
                        np.save(file, array)
                        sync(file)
                write_json(part / FACTS, {name: hash_file(part / name) for name in (VALUES, ROWS)})

    @property
    def digest(self) -> str:
        """Hash of the values of the rows that are done."""
        done = xxhash.xxh128(self.rows.tobytes())
        done.update(np.ascontiguousarray(self.values).data)
        return done.hexdigest()


def _is_whole(folder: Path) -> bool:
    try:
        facts = json.loads((folder / FACTS).read_text())
        whole = all(hash_file(folder / name) == facts[name] for name in (VALUES, ROWS))
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole and folder.exists():
        log.warning("%s is damaged and is computed again", folder)
    return whole


def compute(
    stored: Stored,
    rows: Sequence[int],
    read: Callable[[Sequence[int]], Batch],
    local: LocalModel,
    ranks: Ranks,
    *,
    at_once: int,
) -> None:
    """Score rows, `at_once` by each reader, and take the values in; every rank gets all of them.

    `read` returns the batch of some rows. Where rows or readers are left over, the last ones are
    scored again, since ranks that share weights do as much as each other.
    """
    readers = 1 if local.mesh is None else local.mesh.dims.batch
    for first in range(0, len(rows), at_once * readers):
        group = [*rows[first : first + at_once * readers]]
        group += group[-1:] * (at_once * readers - len(group))
        own = group[local.batch_rank * at_once :][:at_once]
        found = list(_score(local, read(own)))
        for places, values in (pair for part in ranks.gather(found) for pair in part):
            stored.add(places, values)
        stored.rows[group] = True
    local.drop_gathered()


@torch.no_grad()
def _score(
    local: LocalModel, batch: Batch
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield places and log-probabilities of the labels that this rank knows."""
    batch = local.share_rows(batch).to(local.device)
    found: list[Tensor] = []

    def share(
        model: HybridLM, hidden: Tensor | None, micro: Batch, routing: list[RoutingStats]
    ) -> Tensor:
        if hidden is not None:
            found.append(model.lm_head.token_logprobs(hidden, micro.labels).float())
        return torch.zeros((), device=micro.labels.device)

    if local.pipeline is not None:
        local.pipeline.evaluate([batch], share)
    else:
        [model] = local.models
        share(model, model(batch.input_ids, batch.seq_idx), batch, [])
    has_label = batch.labels != NO_LABEL
    for logprobs in found if local.counts_loss else ():
        yield batch.extras[PLACES][has_label].cpu().numpy(), logprobs[has_label].cpu().numpy()
