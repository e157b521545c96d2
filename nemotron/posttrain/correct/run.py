"""Correcting sources with a trained model: one pass, or two with a cache between them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from nemotron.generate.forward import new_cache
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.correct.choose import choose
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.layout import Specials, prefix, second_reading
from nemotron.posttrain.correct.span_ctc import collapse

ROWS = 32
"""Sources of one length that are corrected at once."""


@dataclass(frozen=True)
class Source:
    """What is to be corrected."""

    columns: NDArray[np.int64]
    """[K, n] aligned candidates."""
    scores: NDArray[np.float64] | None = None
    """[K, n] scores that came with the candidates, 0 at holes."""


@dataclass(frozen=True)
class Answer:
    """A corrected source."""

    tokens: list[int]
    selected: list[int]
    """The candidates' tokens that were chosen, before any was answered anew; without holes."""
    scores: NDArray[np.float64] | None = None
    """Of the chosen token of each column, holes included, where tokens are judged."""
    columns: NDArray[np.int64] | None = None
    """The chosen tokens, holes included."""
    durations: NDArray[np.int64] | None = None
    """[K, n] predicted durations of all candidates' tokens, where a head predicts them."""


@dataclass(frozen=True)
class Corrector:
    """A model with what its recipe says about correction."""

    model: HybridLM
    options: CorrectOptions
    specials: Specials
    is_text: Bool[Tensor, " V"]
    """Ids that an answer may have."""
    threshold: float
    """Score up to which a token is answered anew (kind soft)."""
    _caches: list[Cache] = field(default_factory=list, init=False, repr=False)
    """The one of the calls before, if it is there."""
    _forbidden: dict[int | None, Bool[Tensor, " V"]] = field(
        default_factory=dict, init=False, repr=False
    )
    """Ids that an answer may not have, by the mark that it may have."""

    @torch.inference_mode()
    def correct(self, sources: Sequence[Source]) -> list[Answer]:
        """Return the answer to each source."""
        by_length: dict[int, list[int]] = {}
        for number, source in enumerate(sources):
            by_length.setdefault(source.columns.shape[1], []).append(number)
        empty = by_length.pop(0, [])  # there is no place for an answer
        answers: dict[int, Answer] = {number: Answer([], []) for number in empty}
        for numbers in by_length.values():
            for first in range(0, len(numbers), ROWS):
                some = numbers[first : first + ROWS]
                found = self._alike([sources[number] for number in some])
                answers |= dict(zip(some, found, strict=True))
        return [answers[number] for number in range(len(sources))]

    def _alike(self, sources: Sequence[Source]) -> list[Answer]:
        """Correct sources of one length."""
        return {
            "tag": self._tag,
            "ctc": self._ctc,
            "soft": self._soft,
            "duration": self._duration,
        }[self.options.kind](sources)

    def _tag(self, sources: Sequence[Source]) -> list[Answer]:
        void = self.specials.marks.void
        if self.model.steps is None:  # layers one by one need no cache
            hidden = self._read(sources, readings=2)
        else:
            with self._open(len(sources)) as cache:
                hidden = self._read(sources, readings=2, cache=cache)
        second = second_reading(sources[0].columns.shape[1])
        found = self._best(hidden[:, second], void).tolist()
        return [
            Answer([t for t in tokens if t != void], self._without_holes(source.columns[0]))
            for source, tokens in zip(sources, found, strict=True)
        ]

    def _ctc(self, sources: Sequence[Source]) -> list[Answer]:
        selected = [self._without_holes(source.columns[0]) for source in sources]
        runs = [[(token, True) for token in tokens] for tokens in selected]
        with self._open(len(sources)) as cache:
            self._read(sources, readings=1, cache=cache, only_last=True)
            found = self._rewrite(cache, runs)
        return [Answer(tokens, own) for tokens, own in zip(found, selected, strict=True)]

    def _soft(self, sources: Sequence[Source]) -> list[Answer]:
        void = self.specials.marks.void
        runs: list[list[tuple[int, bool]]] = []
        with self._open(len(sources)) as cache:
            judged = self._judge(sources, self._read(sources, readings=2, cache=cache))
            for columns, scores in judged:
                flagged = (scores <= self.threshold).tolist()
                pairs = zip(columns.tolist(), flagged, strict=True)
                runs.append([(token, wrong) for token, wrong in pairs if token != void])
            found = self._rewrite(cache, runs)
        return [
            Answer(tokens, self._without_holes(columns), scores, columns)
            for tokens, (columns, scores) in zip(found, judged, strict=True)
        ]

    def _judge(
        self, sources: Sequence[Source], hidden: Float[Tensor, "B T D"]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Return the chosen token of each column, and its score."""
        second = second_reading(sources[0].columns.shape[1])
        logprobs = self.model.logits(hidden[:, second]).float().log_softmax(-1)  # [B, n, V]
        columns = torch.from_numpy(np.stack([s.columns.T for s in sources]))
        scores = logprobs.gather(2, columns.to(logprobs.device)).double().cpu().numpy()
        found = []
        for source, own in zip(sources, scores, strict=True):
            total = own.T
            if source.scores is not None:
                total = total + self.options.acoustic_weight * source.scores
            chosen = choose(source.columns, total)
            at = np.arange(len(chosen))
            found.append((source.columns[chosen, at], total[chosen, at]))
        return found

    def _duration(self, sources: Sequence[Source]) -> list[Answer]:
        with self._open(len(sources)) as cache:
            return self._repeat(sources, cache)

    def _repeat(self, sources: Sequence[Source], cache: CachedRows) -> list[Answer]:
        """Answer each token as often as its duration says."""
        model = self.model
        assert model.edit_heads is not None, "a rule of the recipe"
        hidden = self._read(sources, readings=2, cache=cache)
        num_columns = sources[0].columns.shape[1]
        states = hidden[:, second_reading(num_columns)]
        columns = torch.from_numpy(np.stack([s.columns.T for s in sources])).to(hidden.device)
        own = model.look_up(columns.flatten(1)).unflatten(1, columns.shape[1:])
        flat = states.flatten(0, 1), own.flatten(0, 1), hidden[:, 1 + num_columns]
        guesses = model.edit_heads(*flat)
        durations = guesses.durations.view(columns.shape)  # [B, n, K]
        has_token = columns != self.specials.marks.void
        odd = (durations - durations.round()).square().masked_fill(~has_token, 0).sum(1)
        odd = odd / has_token.sum(1).clamp(min=1)  # [B, K]
        candidate = (odd + guesses.losses).argmin(1)
        best = candidate.view(-1, 1, 1).expand(-1, num_columns, 1)
        longest = self.options.max_duration
        rounded = durations.round().clamp(0, longest).long()
        times = rounded.gather(2, best).squeeze(2)
        chosen = columns.gather(2, best).squeeze(2)
        slots = [
            [t for t, n in zip(row, count, strict=True) if t != void for _ in range(n)]
            for void in [self.specials.marks.void]
            for row, count in zip(chosen.tolist(), times.tolist(), strict=True)
        ]
        found = self._answer(cache, slots)
        guessed = rounded.transpose(1, 2).cpu().numpy()
        return [
            Answer(tokens, self._without_holes(source.columns[number]), durations=own)
            for tokens, source, number, own in zip(
                found, sources, candidate.tolist(), guessed, strict=True
            )
        ]

    def _rewrite(self, cache: CachedRows, runs: list[list[tuple[int, bool]]]) -> list[list[int]]:
        """Answer the tokens that are flagged, each by several slots; the others stay."""
        copies = self.options.copies
        slots = [[t for t, wrong in row for _ in range(copies if wrong else 1)] for row in runs]
        blank = self.specials.marks.blank
        # where nothing is flagged, nothing is read again
        needs = any(wrong for row in runs for _, wrong in row)
        answers = self._answer(cache, slots, blank) if needs else slots
        found = []
        for row, answer in zip(runs, answers, strict=True):
            tokens: list[int] = []
            run: list[int] = []
            place = 0
            for token, wrong in row:
                if wrong:
                    run += answer[place : place + copies]
                    place += copies
                    continue
                tokens += collapse(run, blank)
                run = []
                tokens.append(token)
                place += 1
            found.append(tokens + collapse(run, blank))
        return found

    def _answer(
        self, cache: CachedRows, slots: list[list[int]], allowed: int | None = None
    ) -> list[list[int]]:
        """Return the likeliest token at each slot, after what the cache has read."""
        length = max(map(len, slots))
        if not length:
            return slots
        ids = torch.full((len(slots), length), self.specials.end)
        for row, own in zip(ids, slots, strict=True):
            row[: len(own)] = torch.tensor(own, dtype=torch.int64)
        hidden = self.model(ids.to(self.is_text.device), cache=cache)
        found = self._best(hidden, allowed).tolist()
        return [row[: len(own)] for row, own in zip(found, slots, strict=True)]

    def _best(
        self, hidden: Float[Tensor, "B T D"], allowed: int | None = None
    ) -> Int[Tensor, "B T"]:
        """Return the likeliest token of text, or the one mark that is allowed beside."""
        forbidden = self._forbidden.get(allowed)
        if forbidden is None:
            forbidden = self._forbidden[allowed] = ~self.is_text
            if allowed is not None:
                forbidden[allowed] = False
        return self.model.logits(hidden).masked_fill(forbidden, float("-inf")).argmax(-1)

    @contextmanager
    def _open(self, count: int) -> Iterator[CachedRows]:
        """Give empty rows of a cache, which is used again by the next call."""
        if not self._caches or len(self._caches[0].lengths) < count:
            self._caches[:] = [new_cache(self.model, count)]
        cache = self._caches[0]
        slots = [cache.admit() for _ in range(count)]
        try:
            yield CachedRows(cache, slots)
        finally:
            for slot in slots:
                cache.free(slot)

    def _read(
        self,
        sources: Sequence[Source],
        readings: int,
        cache: CachedRows | None = None,
        *,
        only_last: bool = False,
    ) -> Float[Tensor, "B S D"]:
        """Read the sources so many times; return all hidden states, or the last."""
        columns = [prefix(source.columns.T, readings, self.specials) for source in sources]
        candidates = torch.from_numpy(np.stack(columns)).to(self.is_text.device)  # [B, T, K]
        several = candidates if candidates.shape[2] > 1 else None
        ids = candidates[:, :, 0]
        return self.model(ids, cache=cache, candidates=several, only_last=only_last)

    def _without_holes(self, tokens: NDArray[np.int64]) -> list[int]:
        return tokens[tokens != self.specials.marks.void].tolist()


def text_ids(vocab_size: int, known: int, specials: frozenset[int]) -> Bool[Tensor, " V"]:
    """Return which ids stand for text: those of the tokenizer without its special tokens."""
    allowed = torch.arange(vocab_size) < known
    allowed[[i for i in specials if i < vocab_size]] = False
    return allowed
