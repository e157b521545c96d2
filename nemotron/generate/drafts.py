"""Guesses at the next tokens: by the multi-token-prediction block, or from the text so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.generate.sample import Sample
from nemotron.generate.sampling import draw
from nemotron.generate.selection import Draft
from nemotron.model.ahead import RowsAhead
from nemotron.model.cache import Cache
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import slots_of


class Drafter(Protocol):
    """Guesses tokens. The newest token of a sample is chosen, but the backbone has not read it."""

    def follow(
        self, model: HybridLM, samples: Sequence[Sample], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """Take note of tokens that the backbone has read, with its hidden states."""

    def keep(self, sample: Sample, hidden: Float[Tensor, "T D"]) -> None:
        """Take note of those that were read after `draft`: the newest token and good drafts."""

    def skip(self, samples: Sequence[Sample], hidden: Float[Tensor, "B D"]) -> None:
        """Take note of the newest token of each sample, which was read without `draft`."""

    def reach(self, sample: Sample, longest: int) -> int:
        """Return how many tokens could be drafted, `longest` at most."""

    def draft(
        self, model: HybridLM, samples: Sequence[Sample], counts: Sequence[int]
    ) -> list[list[Draft]]:
        """Guess at most so many tokens of each sample, at least one."""


def predict_ahead(
    model: HybridLM, tokens: Int[Tensor, "B T"], hidden: Float[Tensor, "B T D"], rows: RowsAhead
) -> Float[Tensor, "B T D"]:
    """Continue texts of a cache in the prediction block; return its hidden states.

    `hidden` are those of the tokens before `tokens`: the backbone's, or the block's own.
    """
    assert model.mtp is not None, "the configuration has no multi-token-prediction block"
    if model.steps is not None:
        found = model.steps.ahead(model, tokens, hidden, rows)
        if found is not None:
            return found
    return model.mtp(model.embed(tokens), hidden, None, cache=rows)[0]


class BlockDrafter:
    """Drafts with the multi-token-prediction block, applied to what it predicted itself.

    The first token of a draft is predicted exactly as in training. If `draws`, tokens are drawn as
    the request says, without its biases and penalties; else the likeliest are taken.
    Source: NVIDIA/Megatron-LM: megatron/core/inference (`_compute_serial_mtp_and_sample`).
    """

    def __init__(self, cache: Cache, *, draws: bool) -> None:
        assert cache.ahead is not None, "the cache has no place for drafts"
        self._cache, self._ahead, self._draws = cache, cache.ahead, draws

    @torch.inference_mode()
    def follow(
        self, model: HybridLM, samples: Sequence[Sample], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """As `Drafter.follow`."""
        groups: dict[int, list[int]] = {}
        for row, sample in enumerate(samples):
            assert sample.slot is not None
            is_first = self._cache.lengths[sample.slot] == hidden.shape[1]
            if self._num_unread(sample) or is_first:
                groups.setdefault(self._num_unread(sample), []).append(row)
        for unread, rows in groups.items():
            self._read(model, [samples[row] for row in rows], hidden[rows], unread)

    def _read(
        self,
        model: HybridLM,
        samples: Sequence[Sample],
        hidden: Float[Tensor, "B T D"],
        unread: int,
    ) -> None:
        """Let the block read what the backbone has read, but for the newest hidden states."""
        ahead, slots = self._ahead, _slots(samples)
        known = torch.cat([ahead.hidden[slots, :unread], hidden], dim=1)
        count = known.shape[1] - 1
        ends = [self._cache.lengths[slot] for slot in slots]
        if count:
            texts = [s.tokens[end - count : end] for s, end in zip(samples, ends, strict=True)]
            rows = RowsAhead(self._cache, slots, [end - count for end in ends])
            self._predict(model, texts, known[:, :-1], rows)
        for slot, newest in zip(slots, known[:, -1:], strict=True):
            ahead.put(slot, newest)

    def keep(self, sample: Sample, hidden: Float[Tensor, "T D"]) -> None:
        """As `Drafter.keep`."""
        assert sample.slot is not None
        self._ahead.put(sample.slot, hidden)

    def skip(self, samples: Sequence[Sample], hidden: Float[Tensor, "B D"]) -> None:
        """As `Drafter.skip`."""
        self._ahead.add(_slots(samples), hidden)

    def reach(self, sample: Sample, longest: int) -> int:
        """As `Drafter.reach`; none after many tokens that the block has not read."""
        return longest if self._num_unread(sample) else 0

    @torch.inference_mode()
    def draft(
        self, model: HybridLM, samples: Sequence[Sample], counts: Sequence[int]
    ) -> list[list[Draft]]:
        """As `Drafter.draft`."""
        slots, unread = _slots(samples), [self._num_unread(sample) for sample in samples]
        ends = [self._cache.lengths[slot] for slot in slots]
        begins = [end - count + 1 for end, count in zip(ends, unread, strict=True)]
        longest = max(unread)
        # shorter rows are filled up; what is remembered of that is replaced before it is read
        texts = [
            (sample.tokens[begin : end + 1] + [0] * longest)[:longest]
            for sample, begin, end in zip(samples, begins, ends, strict=True)
        ]
        hidden = self._ahead.hidden[slots_of(slots, self._cache.device), :longest]
        hidden = self._predict(model, texts, hidden, RowsAhead(self._cache, slots, begins))
        if min(unread) == longest:
            hidden = hidden[:, -1:]
        else:
            last = torch.tensor(unread, device=hidden.device).view(-1, 1, 1) - 1
            hidden = hidden.take_along_dim(last, dim=1)
        rows = RowsAhead(self._cache, slots, [end + 1 for end in ends])
        columns: list[list[Draft]] = []
        for place in range(max(counts)):
            if columns:
                newest = [[draft.token] for draft in columns[-1]]
                hidden = self._predict(model, newest, hidden, rows)
            columns.append(self._pick(samples, model.logits(hidden[:, 0]), place))
        return [[column[row] for column in columns[:count]] for row, count in enumerate(counts)]

    def _predict(
        self,
        model: HybridLM,
        texts: list[list[int]],
        hidden: Float[Tensor, "B T D"],
        rows: RowsAhead,
    ) -> Float[Tensor, "B T D"]:
        return predict_ahead(model, torch.tensor(texts, device=hidden.device), hidden, rows)

    def _pick(
        self, samples: Sequence[Sample], logits: Float[Tensor, "B V"], place: int
    ) -> list[Draft]:
        drafts: list[Draft | None] = [
            Draft(sample.forced[place]) if place < len(sample.forced) else None
            for sample in samples
        ]
        groups: dict[tuple[object, ...], list[int]] = {}
        for row, sample in enumerate(samples):
            if drafts[row] is None and self._draws and sample.request.sampling.temperature > 0:
                groups.setdefault(sample.request.sampling.cut, []).append(row)
        for rows in groups.values():
            sampling = samples[rows[0]].request.sampling
            uniform = torch.tensor(
                [samples[row].draft_uniform(place) for row in rows], dtype=torch.float64
            )
            part = logits if len(rows) == len(samples) else logits[rows]
            drawn = draw(part, sampling, uniform.to(logits.device))
            for row, token, share in zip(rows, drawn.tokens.tolist(), drawn.shares, strict=True):
                drafts[row] = Draft(token, share)
        if None not in drafts:
            return [draft for draft in drafts if draft is not None]
        likeliest = logits.argmax(-1).tolist()
        return [draft or Draft(token) for draft, token in zip(drafts, likeliest, strict=True)]

    def _num_unread(self, sample: Sample) -> int:
        assert sample.slot is not None
        return self._ahead.counts[sample.slot]


SIZES = (4, 3, 2)
"""Tokens at the end of a text that are looked for further up, in this order."""


@dataclass
class _Index:
    """Where the newest of each sequence of tokens ended, but for those at the text's end."""

    num_tokens: int = 0
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take note of what stands before the last token."""
        for end in range(self.num_tokens + 1, len(tokens)):
            for size in SIZES:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.num_tokens = len(tokens) - 1

    def find(self, tokens: Sequence[int]) -> int | None:
        """Return where the text went on after what it ends with."""
        for size in SIZES:
            if (end := self.ends.get(tuple(tokens[-size:]))) is not None:
                return end
        return None


class LookupDrafter:
    """Drafts what followed when the text last had the tokens that it ends with; needs no weights.

    Source: Saxena 2023, "Prompt Lookup Decoding".
    """

    def __init__(self) -> None:
        self._indices: WeakKeyDictionary[Sample, _Index] = WeakKeyDictionary()

    def follow(
        self, model: HybridLM, samples: Sequence[Sample], hidden: Float[Tensor, "B T D"]
    ) -> None:
        """Nothing: the text is all that counts."""

    def keep(self, sample: Sample, hidden: Float[Tensor, "T D"]) -> None:
        """Nothing."""

    def skip(self, samples: Sequence[Sample], hidden: Float[Tensor, "B D"]) -> None:
        """Nothing."""

    def reach(self, sample: Sample, longest: int) -> int:
        """As `Drafter.reach`: as far as the text went on at its other place."""
        return len(self._guess(sample, longest))

    def draft(
        self, model: HybridLM, samples: Sequence[Sample], counts: Sequence[int]
    ) -> list[list[Draft]]:
        """As `Drafter.draft`."""
        return [
            [Draft(token) for token in self._guess(sample, count)]
            for sample, count in zip(samples, counts, strict=True)
        ]

    def _guess(self, sample: Sample, count: int) -> list[int]:
        if sample.forced:
            return list(sample.forced)[:count]
        index = self._indices.setdefault(sample, _Index())
        index.extend(sample.tokens)
        end = index.find(sample.tokens)
        return [] if end is None else sample.tokens[end : end + count]


def _slots(samples: Sequence[Sample]) -> list[int]:
    return [sample.slot for sample in samples if sample.slot is not None]
