"""Speculative decoding: a pass reads several guessed tokens, and those that are right are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError
from nemotron.generate.acceptance import Acceptance
from nemotron.generate.drafts import BlockDrafter, Drafter, LookupDrafter
from nemotron.generate.request import DraftedPass, Event
from nemotron.generate.rollback import WAYS, Way
from nemotron.generate.routing import keep_experts, recorded
from nemotron.generate.sample import Sample
from nemotron.generate.selection import Draft, select
from nemotron.model.cache import Cache
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM

Source = Literal["mtp", "lookup"]
Method = Literal["rejection", "match"]

MAX_LENGTH = 16
"""Longest draft; a longer one is never accepted often enough."""
DRAFT_COST = 0.15
"""Assumed time of drafting and reading one more token, in passes that read one."""
MEMORY = 0.9
"""Weight of a pass in the estimate of acceptance, for each pass after it."""


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed and tested; answers are distributed as without.

    Drafts come from the multi-token-prediction block (`mtp`), or from what followed the same tokens
    further up (`lookup`). `rejection` accepts a draft with the probability that keeps the
    distribution, `match` if it is the token that is drawn anyway: it accepts less, but answers are
    those without speculation for each seed. With temperature 0, and for `lookup`, both are the
    same. `length` is that of a draft, the largest one if it is `adaptive`: each answer then has
    drafts as long as those that paid before.
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
        return 1 + self.length if self.source == "mtp" else 0

    def check(self, config: ModelConfig) -> None:
        """Refuse a model that cannot draft in this way.

        Raises:
            UserError: when it has no multi-token-prediction block.
        """
        if self.source == "mtp" and not config.mtp_pattern:
            raise UserError(
                "the model has no multi-token-prediction block to draft with; use lookup."
            )


def next_length(passes: Sequence[DraftedPass], longest: int) -> int:
    """Return how many tokens to draft after these passes, from 1 to `longest`.

    With probability a that a draft is accepted, k drafts bring 1 + a + … + a^k tokens; the k is
    chosen that brings most tokens for the time.
    """
    accepted, tested = 1.0, 1.0  # long drafts until something is known
    for done in passes[-32:]:
        accepted = MEMORY * accepted + done.num_accepted
        tested = MEMORY * tested + min(done.num_accepted + 1, done.num_drafts)
    share = accepted / tested

    def speed(count: int) -> float:
        return sum(share**k for k in range(count + 1)) / (1 + DRAFT_COST * count)

    return max(range(1, longest + 1), key=speed)


class Speculator:
    """Brings samples several tokens further in one pass of the model.

    The newest token of each is chosen and not yet read.
    """

    def __init__(self, cache: Cache, speculation: Speculation) -> None:
        self._cache, self._settings = cache, speculation
        self._rollback = WAYS[speculation.rollback]()
        self.drafter: Drafter = LookupDrafter()
        if speculation.source == "mtp":
            self.drafter = BlockDrafter(cache, draws=speculation.method == "rejection")
        self.acceptance = Acceptance()

    @property
    def room(self) -> int:
        """Tokens that a pass appends to a text before it forgets some."""
        return 1 + self._settings.length

    @torch.inference_mode()
    def step(self, model: HybridLM, samples: Sequence[Sample], version: int) -> list[Event]:
        """Append at least one token to each sample; those that end keep their slots."""
        by_slot = {sample.slot: sample for sample in samples if sample.slot is not None}
        samples = [by_slot[slot] for slot in sorted(by_slot)]  # neighbors need no copies
        drafts = self.drafter.draft(model, samples, [self._count(sample) for sample in samples])
        rows = self._rollback.rows(self._cache, sorted(by_slot))
        starts = [self._cache.lengths[slot] for slot in rows.slots]
        tokens = self._tokens(samples, drafts)
        has_experts = any(sample.request.experts for sample in samples)
        with recorded(model, on=has_experts) as record:
            hidden = model(tokens, cache=rows)
        events, counts = _decide(samples, drafts, model.logits(hidden), version)
        self._rollback.keep_first(model, rows, tokens, counts)
        if record.layers:
            keep_experts(record.experts(len(samples)), samples, starts, counts)
        for row, (sample, count) in enumerate(zip(samples, counts, strict=True)):
            self.drafter.keep(sample, hidden[row, :count])
            self._note(sample, DraftedPass(len(drafts[row]), count - 1))
        return events

    def _count(self, sample: Sample) -> int:
        """Return how many tokens to draft: none after the last one of the answer."""
        longest = self._settings.length
        if self._settings.adaptive:
            longest = next_length(sample.answer.passes, longest)
        return min(longest, sample.request.max_tokens - len(sample.answer.tokens) - 1)

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
