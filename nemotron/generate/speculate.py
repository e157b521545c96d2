"""Speculative decoding: a pass reads several guessed tokens, and those that are right are kept."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError
from nemotron.generate.acceptance import Acceptance
from nemotron.generate.draft_length import DraftLengths
from nemotron.generate.drafts import BlockDrafter, Drafter, LookupDrafter
from nemotron.generate.request import DraftedPass, Event
from nemotron.generate.rollback import WAYS, Way
from nemotron.generate.routing import keep_experts, recorded
from nemotron.generate.sample import Sample
from nemotron.generate.selection import Draft, select
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM

Source = Literal["mtp", "lookup"]
Method = Literal["rejection", "match"]

MAX_LENGTH = 16
"""Longest draft; a longer one is never accepted often enough."""
HELD = 64
"""Hidden states of tokens that the multi-token-prediction block has not read while it did not
draft; an answer with more of them gets no more drafts of the block."""


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed and tested; answers are distributed as without.

    Drafts come from the multi-token-prediction block (`mtp`), or from what followed the same tokens
    further up (`lookup`). `rejection` accepts a draft with the probability that keeps the
    distribution, `match` if it is the token that is drawn anyway: it accepts less, but answers are
    those without speculation for each seed. With temperature 0, and for `lookup`, both are the
    same. `length` is that of a draft, the largest one if it is `adaptive`: drafts are then as long
    as they pay, and there are none where none does.
    """

    source: Source = "mtp"
    length: int = 3
    method: Method = "rejection"
    rollback: Way = "replay"
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MAX_LENGTH:
            rule = f"must lie in 1 … {MAX_LENGTH}."
            raise UserError(rule, key="draft_tokens", value=self.length)
        choices = {
            "speculate": (self.source, Source),
            "draft_method": (self.method, Method),
            "rollback": (self.rollback, Way),
        }
        for name, (value, known) in choices.items():
            if value not in get_args(known):
                rule = f"is not known; use one of {', '.join(get_args(known))}."
                raise UserError(rule, key=name, value=value)

    @property
    def num_unread(self) -> int:
        """Hidden states that the multi-token-prediction block reads at once, if it drafts."""
        return 1 + max(self.length, HELD) if self.source == "mtp" else 0

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that cannot draft in this way.

        Raises:
            UserError: when it has no multi-token-prediction block.
        """
        if self.source == "mtp" and not config.mtp_pattern:
            raise UserError(
                "the model has no multi-token-prediction block to draft with; use lookup."
            )


class Speculator:
    """Brings samples several tokens further in one pass of the model.

    The newest token of each is chosen and not yet read.
    """

    def __init__(self, cache: Cache, config: ModelConfig, speculation: Speculation) -> None:
        self._cache, self._settings = cache, speculation
        self._rollback = WAYS[speculation.rollback]()
        self.drafter: Drafter = LookupDrafter()
        if speculation.source == "mtp":
            self.drafter = BlockDrafter(cache, draws=speculation.method == "rejection")
        self.acceptance = Acceptance()
        self._plain: CachedRows | None = None
        """Rows of the newest pass without drafts."""
        self._lengths = DraftLengths(
            config,
            len(cache.lengths),
            cache.device.type,
            longest=speculation.length,
            is_drawn=speculation.source == "mtp" and speculation.method == "rejection",
            has_block=speculation.source == "mtp",
        )

    @property
    def room(self) -> int:
        """Tokens that a pass appends to a text before it forgets some."""
        return 1 + self._settings.length

    @torch.inference_mode()
    def step(self, model: HybridLM, samples: Sequence[Sample], version: int) -> list[Event]:
        """Append at least one token to each sample; those that end keep their slots."""
        begin = time.perf_counter()
        by_slot = {sample.slot: sample for sample in samples if sample.slot is not None}
        slots = sorted(by_slot)  # neighbors need no copies
        samples = [by_slot[slot] for slot in slots]
        drafts = self._draft(model, samples)
        longest = max(map(len, drafts))
        rows = self._rows(slots, has_drafts=longest > 0)
        starts = [self._cache.lengths[slot] for slot in slots]
        tokens = self._tokens(samples, drafts)
        has_experts = any(sample.request.experts for sample in samples)
        with recorded(model, on=has_experts) as record:
            hidden = model(tokens, cache=rows)
        events, counts = _decide(samples, drafts, model.logits(hidden), version)
        if longest:
            self._rollback.keep_first(model, rows, tokens, counts)
        if record.layers:
            keep_experts(record.experts(len(samples)), samples, starts, counts)
        self._keep(samples, drafts, hidden, counts)
        passes = [DraftedPass(len(d), n - 1) for d, n in zip(drafts, counts, strict=True)]
        for sample, done in zip(samples, passes, strict=True):
            self._note(sample, done)
        self._lengths.note(samples, passes, time.perf_counter() - begin)
        return events

    def _draft(self, model: HybridLM, samples: Sequence[Sample]) -> list[list[Draft]]:
        """Return a draft for each sample; none after the last token of an answer."""
        left = [s.request.max_tokens - len(s.answer.tokens) - 1 for s in samples]
        counts = [
            self.drafter.reach(sample, min(self._settings.length, most)) if most else 0
            for sample, most in zip(samples, left, strict=True)
        ]
        drafts: list[list[Draft]] = [[] for _ in samples]
        if self._settings.adaptive and any(counts):
            counts = self._lengths.choose(samples, counts)
        wanted = [row for row, count in enumerate(counts) if count]
        if wanted:
            own = [samples[row] for row in wanted]
            found = self.drafter.draft(model, own, [counts[row] for row in wanted])
            for row, draft in zip(wanted, found, strict=True):
                drafts[row] = draft
        return drafts

    def _keep(
        self,
        samples: Sequence[Sample],
        drafts: Sequence[list[Draft]],
        hidden: Float[Tensor, "B T D"],
        counts: Sequence[int],
    ) -> None:
        """Let the drafter take note of what was read."""
        skipped = [row for row, draft in enumerate(drafts) if not draft]
        for row, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            if drafts[row]:
                self.drafter.keep(sample, hidden[row, :count])
        if skipped:
            newest = hidden[:, 0] if len(skipped) == len(samples) else hidden[skipped, 0]
            self.drafter.skip([samples[row] for row in skipped], newest)

    def _rows(self, slots: list[int], *, has_drafts: bool) -> CachedRows:
        if has_drafts:
            return self._rollback.rows(self._cache, slots)
        if self._plain is None or self._plain.slots != slots:
            self._plain = CachedRows(self._cache, slots)
        return self._plain

    def _tokens(
        self, samples: Sequence[Sample], drafts: Sequence[list[Draft]]
    ) -> Int[Tensor, "B T"]:
        """Return the newest token of each sample and its drafts; shorter rows are filled up."""
        length = 1 + max(map(len, drafts))
        rows = [
            ([sample.tokens[-1], *(draft.token for draft in own)] + [0] * length)[:length]
            for sample, own in zip(samples, drafts, strict=True)
        ]
        return torch.tensor(rows, device=self._cache.device)

    def _note(self, sample: Sample, done: DraftedPass) -> None:
        sample.answer.passes.append(done)
        self.acceptance.count(done)
        if sample.answer.finish is not None:
            self.acceptance.end(sample.answer.passes)


def _decide(
    samples: Sequence[Sample],
    drafts: Sequence[list[Draft]],
    logits: Float[Tensor, "B T V"],
    version: int,
) -> tuple[list[Event], list[int]]:
    """Choose tokens as long as they are those that were drafted, and the one after them.

    Returns the events, and how many of the tokens that were read belong to each text.
    """
    events, counts = [], [0] * len(samples)
    rows = list(range(len(samples)))
    for place in range(logits.shape[1]):
        guesses = [drafts[row][place] if place < len(drafts[row]) else None for row in rows]
        own = logits[:, place] if len(rows) == len(samples) else logits[rows, place]
        chosen = select([samples[row] for row in rows], own, guesses)
        going_on = []
        for row, token, guess in zip(rows, chosen, guesses, strict=True):
            events.append(samples[row].push(token, version))
            counts[row] += 1
            is_right = guess is not None and guess.token == token.token
            if is_right and events[-1].finish is None:
                going_on.append(row)
        rows = going_on
        if not rows:
            break
    return events, counts
