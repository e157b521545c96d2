"""Answers of a model to prompts, by the engine, whatever the prompts are for."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import SLOTS, Engine
from nemotron.generate.request import Answer, Begun, Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.prompts import Prompts

ALL_STATES = 1 << 30
"""Stored states where those of all answers are kept."""


@dataclass(frozen=True)
class Answering:
    """How long answers may be, and how they are computed."""

    max_new_tokens: int
    """Longest answer, its end included."""
    slots: int = SLOTS
    """Answers that are written at the same time."""
    budget: ReasoningBudget | None = None
    row_by_row: bool = False
    """Whether each answer is computed by itself, so that its bits do not depend on the others."""
    keep_states: bool = False
    """Whether answers that are asked to go on do so from the states in which they stopped."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and the answers that are wanted."""

    prompt: tuple[int, ...]
    sampling: Sampling
    num_samples: int = 1
    experts: bool = False
    """Whether the answer says which experts its tokens went to."""
    room: int | None = None
    """Tokens that there may be at most, where that is fewer than of other answers."""
    begun: Begun | None = None
    """How the answer begins; it is then the only sample."""
    pause_at: int | None = None
    """Tokens of the answer after which it stops and has no `finish`, to be gone on with later."""


class Answerer:
    """Answers prompts with the weights that a model has now; the model stays as it is.

    Tokens bear the `version` of the weights.
    """

    def __init__(self, model: HybridLM, prompts: Prompts, how: Answering, version: int = 0) -> None:
        self.prompts, self.how = prompts, how
        self._engine: Engine | None = None
        self._take(model, version)

    def _take(self, model: HybridLM, version: int) -> None:
        self.model, self.version = model, version
        pack = model.lm_head.weight.device.type == "cpu"
        self._view = decode_view(model, pack=pack)

    def update(self, model: HybridLM, version: int) -> None:
        """Go on with the weights that this model has now, from the states of all answers so far."""
        self._take(model, version)
        if self._engine is not None:
            self._engine.update(self._view, version, keep_states=True)

    @torch.no_grad()
    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Return the answers in the order of the prompts, samples of one side by side."""
        if not asked:
            return []
        total = sum(each.num_samples for each in asked)
        engine = self._engine or self._new_engine(total)
        if self.how.keep_states:
            self._engine = engine
        found: dict[tuple[int, int], Answer] = {}
        for event in engine.run([self._request(each) for each in asked]):
            if event.finish is not None:
                found[event.request, event.sample] = event.answer
        answers = [found[key] for key in sorted(found)]
        each_asked = (each for each in asked for _ in range(each.num_samples))
        for answer, each in zip(answers, each_asked, strict=True):
            if answer.finish == "length" and len(answer.tokens) < self._longest(each):
                answer.finish = None
        return answers

    def _new_engine(self, total: int) -> Engine:
        engine = Engine(
            self._view,
            # without one no text is decoded at every token; `Prompts.response` does it once
            tokenizer=self.prompts.tokenizer if self.prompts.stop else None,
            slots=min(self.how.slots, total),
            row_by_row=self.how.row_by_row,
            prefixes=ALL_STATES if self.how.keep_states else 0,
        )
        engine.version = self.version
        return engine

    def _longest(self, asked: Asked) -> int:
        longest = self.how.max_new_tokens
        return longest if asked.room is None else min(longest, asked.room)

    def _request(self, asked: Asked) -> Request:
        longest = self._longest(asked)
        return Request(
            asked.prompt,
            longest if asked.pause_at is None else min(longest, asked.pause_at),
            asked.sampling,
            asked.num_samples,
            stop_ids=self.prompts.stop_ids,
            stop=self.prompts.stop,
            budget=self.how.budget,
            logprobs=True,
            experts=asked.experts,
            begun=asked.begun,
        )


def seed_of(text: str, number: int) -> int:
    """Return a seed below 2^62, so that the samples of a request can count on from it."""
    digest = hashlib.sha256(f"{text} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
