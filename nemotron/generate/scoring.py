"""Log-probabilities of texts under a model, which reads a common beginning of texts once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.generate.branches import Leaf, Scored, Stem, Tokens, grow
from nemotron.generate.forward import PIECE, extend, new_cache
from nemotron.model.cache import Snapshot
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM

ROWS = 16
"""Texts that pass the model together, unless another number is given."""
WASTE = 16
"""Of common beginnings that are read together, so many tokens of the longer ones may be left to
the texts after them, or a `WASTE`-th of what is read."""
LOGITS_AT_ONCE = 256
"""Tokens whose logits are in memory at the same time."""
FILL = 0
"""Token after the end of a shorter text; nothing before it sees it."""


@dataclass
class Score:
    """Log-probability in nats of the scored tokens, and whether each is the likeliest one."""

    logprob: float = 0.0
    is_greedy: bool = True


@dataclass(frozen=True)
class _Begun:
    """A text whose first `at` tokens are read; `state` is the cache after them."""

    leaf: Leaf
    at: int
    state: Snapshot | None

    @property
    def rest(self) -> Tokens:
        return self.leaf.inputs[self.at :]


class Scorer:
    """Scores texts with one model, `rows` at a time."""

    def __init__(self, model: HybridLM, rows: int = ROWS) -> None:
        self.model, self.rows = model, rows
        self._cache = new_cache(model, rows)

    def score(
        self, texts: Sequence[Scored], progress: Callable[[int], None] = lambda count: None
    ) -> list[Score]:
        """Return the score of each text; `progress` receives how many more are done."""
        scores = [Score() for _ in texts]
        for begun in self._read(grow(texts), 0, None):
            self._finish(begun, texts, scores)
            progress(sum(len(one.leaf.members) for one in begun))
        return scores

    def _read(self, stem: Stem, at: int, state: Snapshot | None) -> Iterator[list[_Begun]]:
        """Yield batches of texts, whose common beginnings were read up to some place.

        A state is given back when the batches after it have been used.
        """
        own = [_Begun(leaf, at, state) for leaf in stem.leaves]
        yield from self._batches(own)
        for stems in self._alike(stem.stems, at):
            length = stems[-1].length
            states = self._advance([one.tokens[at:length] for one in stems], state)
            pairs = list(zip(stems, states, strict=True))
            begun = [_Begun(leaf, length, after) for one, after in pairs for leaf in one.leaves]
            yield from self._batches(begun)
            for one, after in pairs:
                yield from self._read(Stem(one.length, one.stems), length, after)
                self._cache.release(after)

    def _alike(self, stems: list[Stem], at: int) -> Iterator[list[Stem]]:
        """Yield stems that are read together as far as the shortest goes, the longest first."""
        batch: list[Stem] = []
        for stem in sorted(stems, key=lambda one: one.length, reverse=True):
            allowed = max(WASTE, (stem.length - at) // WASTE)
            if batch and (len(batch) == self.rows or batch[0].length - stem.length > allowed):
                yield batch
                batch = []
            batch.append(stem)
        if batch:
            yield batch

    def _batches(self, begun: list[_Begun]) -> Iterator[list[_Begun]]:
        """Yield texts that are read together, the longest first."""
        begun = sorted(begun, key=lambda one: len(one.rest), reverse=True)
        for first in range(0, len(begun), self.rows):
            yield begun[first : first + self.rows]

    def _advance(self, texts: Sequence[Tokens], state: Snapshot | None) -> list[Snapshot]:
        """Read texts of one length after a state; return the states after them."""
        cache = self._cache
        slots = [cache.admit(state) for _ in texts]
        rows = CachedRows(cache, slots)
        for tokens in torch.tensor(texts, device=cache.device).split(PIECE, dim=1):
            extend(self.model, rows, tokens)
        states = [cache.snapshot(slot) for slot in slots]
        for slot in slots:
            cache.free(slot)
        return states

    def _finish(self, begun: list[_Begun], texts: Sequence[Scored], scores: list[Score]) -> None:
        """Read the rest of some texts, the longest first, and add to the scores of their members.

        Shorter ones are filled up at the end; the cache forgets them all afterwards.
        """
        cache, longest = self._cache, len(begun[0].rest)
        slots = [cache.admit(one.state) for one in begun]
        rows = CachedRows(cache, slots)
        filled = [one.rest + (FILL,) * (longest - len(one.rest)) for one in begun]
        tokens = torch.tensor(filled, device=cache.device)
        for first in range(0, longest, PIECE):
            hidden = extend(self.model, rows, tokens[:, first : first + PIECE])
            targets = _targets(begun, texts, first, hidden.shape[1])
            for part in range(0, len(targets), LOGITS_AT_ONCE):
                self._add(hidden, targets[part : part + LOGITS_AT_ONCE], scores)
        for slot in slots:
            cache.free(slot)

    @torch.inference_mode()
    def _add(
        self, hidden: Float[Tensor, "B T D"], targets: "list[_Target]", scores: list[Score]
    ) -> None:
        """Add the log-probabilities of some tokens to the scores of their texts."""
        places = {target.place: None for target in targets}
        numbers = {place: number for number, place in enumerate(places)}
        index = torch.tensor(list(places), device=hidden.device)
        logits = self.model.logits(hidden.flatten(0, 1)[index])  # [P, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        rows = torch.tensor([numbers[t.place] for t in targets], device=hidden.device)
        tokens = torch.tensor([t.token for t in targets], device=hidden.device)
        found = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).tolist()
        is_greedy = (logits.argmax(-1)[rows] == tokens).tolist()
        for target, logprob, is_likeliest in zip(targets, found, is_greedy, strict=True):
            scores[target.member].logprob += logprob
            scores[target.member].is_greedy &= is_likeliest


@dataclass(frozen=True)
class _Target:
    """A token whose log-probability is needed, and after which hidden state of a call."""

    place: int
    token: int
    member: int


def _targets(
    begun: list[_Begun], texts: Sequence[Scored], first: int, length: int
) -> list[_Target]:
    """Return what is needed of the `length` tokens of the calls, from `first` on."""
    found = []
    for row, one in enumerate(begun):
        begin = one.at + first
        for member in one.leaf.members:
            text = texts[member]
            last = min(len(text.tokens) - 1, begin + length)
            for place in range(max(one.leaf.own, begin), last):
                found.append(_Target(row * length + place - begin, text.tokens[place + 1], member))
    return found
