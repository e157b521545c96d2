"""Answers laid side by side in rows, as documents that do not see each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.batch import Batch, Row, pack
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.replay import UNKNOWN, Experts
from nemotron.posttrain.rollout import Rollout

ROWS_MULTIPLE = 16
"""Rows are as long as the fullest one needs, rounded up to a multiple of this."""


@dataclass(frozen=True)
class Rows:
    """Which answers lie in which row; some rows may have none."""

    answers: list[list[Rollout]]
    length: int
    """Inputs of a row."""

    def part(self, first: int, count: int) -> "Rows":
        """Return some of the rows."""
        return Rows(self.answers[first : first + count], self.length)

    def line_up(self, values: Mapping[int, Sequence[float]]) -> Float[Tensor, "B T"]:
        """Return values of the answers' tokens at the positions that predict them.

        `values` has those of an answer under the `id` of its rollout.
        """
        lined_up = torch.zeros(len(self.answers), self.length)
        for row, rollout, first in self._places():
            own = torch.tensor(values[id(rollout)])
            lined_up[row, first : first + len(own)] = own
        return lined_up

    def take_apart(self, values: Float[Tensor, "B T"]) -> dict[int, list[float]]:
        """Return, under the `id` of each rollout, the values of its answer's tokens."""
        return {
            id(rollout): values[row, first : first + len(rollout.tokens)].tolist()
            for row, rollout, first in self._places()
        }

    def batch(self, eod_id: int, average: str, experts: Experts | None = None) -> Batch:
        """Return inputs, and as labels the tokens that count; all others have none.

        With `experts` each input has those that it went to when it was written.
        """
        rows = [_row(rollouts, eod_id, average) for rollouts in self.answers]
        batch = pack(rows, self.length, eod_id, mask_eod_loss=False)
        return batch if experts is None else replace(batch, experts=self.line_up_experts(experts))

    def line_up_experts(self, experts: Experts) -> Int[Tensor, "B T layers K"]:
        """Return the experts that each input went to when it was written, int16; -1 elsewhere."""
        shape = (len(self.answers), self.length, experts.layers, experts.top_k)
        lined_up = torch.full(shape, UNKNOWN, dtype=torch.int16)
        for row, rollout, first in self._places():
            if rollout.experts:
                own = experts.decode(rollout.experts)
                start = first - len(rollout.task.prompt) + 1
                lined_up[row, start : start + len(own)] = own
        return lined_up

    def _places(self) -> list[tuple[int, Rollout, int]]:
        """Return each answer with its row and the position that predicts its first token."""
        found = []
        for row, rollouts in enumerate(self.answers):
            start = 0
            for rollout in rollouts:
                found.append((row, rollout, start + len(rollout.task.prompt) - 1))
                start += len(rollout.task.prompt) + len(rollout.tokens)
        return found


def pack_answers(rollouts: Sequence[Rollout], config: RlConfig, multiple: int) -> Rows:
    """Put answers into rows of at most `data.seq_len`, the longest first, where they fit first.

    The number of rows is a multiple of `multiple`, so that every rank gets as many.
    """
    rows: list[list[Rollout]] = []
    left: list[int] = []
    size_of = {id(r): len(r.task.prompt) + len(r.tokens) for r in rollouts}
    for rollout in sorted(rollouts, key=lambda r: -size_of[id(r)]):
        size = size_of[id(rollout)]
        # a row has one token more than it has inputs
        place = next((i for i, room in enumerate(left) if room >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            left.append(config.data.seq_len + 1)
        rows[place].append(rollout)
        left[place] -= size
    longest = max(sum(size_of[id(r)] for r in row) for row in rows) - 1
    length = min(-(-longest // ROWS_MULTIPLE) * ROWS_MULTIPLE, config.data.seq_len)
    rows += [[] for _ in range(-len(rows) % multiple)]
    return Rows(rows, length)


def _row(rollouts: Sequence[Rollout], eod_id: int, average: str) -> Row:
    if not rollouts:
        return Row(np.array([eod_id, eod_id]), np.array([0]), np.zeros(2, np.float32))
    tokens: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    starts: list[int] = []
    for rollout in rollouts:
        starts.append(sum(each.size for each in tokens))
        counted = np.array([not forced for forced in rollout.forced], np.float32)
        if rollout.is_masked:
            counted[:] = 0
        if average == "sequence" and counted.any():
            counted /= counted.sum()
        prompt = rollout.task.prompt
        tokens.append(np.array([*prompt, *rollout.tokens], np.int64))
        weights.append(np.concatenate([np.zeros(len(prompt), np.float32), counted]))
    return Row(np.concatenate(tokens), np.array(starts), np.concatenate(weights))
