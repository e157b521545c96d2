"""Lines corrected one token after the other, by a model that was fine-tuned on pairs as chats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemotron.data.chat.render import render
from nemotron.data.correct.pair import prompt_of
from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.engine import SLOTS, Engine
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.correct.answers import Corrected, Counts, Line

MORE = 8
"""Tokens that an answer may have beyond twice those of the first candidate."""


@dataclass(frozen=True)
class WrittenOut:
    """Asks for the text as `data pairs --as chat` does; the likeliest token is taken."""

    model: HybridLM
    """One that decodes fast, of `decode_view`."""
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    candidates: int = 1
    """Candidates that a prompt shows."""

    @torch.no_grad()
    def __call__(self, lines: Sequence[Line], counts: Counts) -> list[Corrected]:
        """Return the answer to each line; the first candidate where it is empty or too long."""
        firsts = self.tokenizer.encode_batch([line.pair.candidates[0] for line in lines])
        requests = [
            Request(
                self._prompt(line),
                2 * len(first) + MORE,
                Sampling(0.0),
                stop_ids=self.stop_ids,
            )
            for line, first in zip(lines, firsts, strict=True)
        ]
        for line in lines:
            counts.repeated += len(line.pair.candidates) < self.candidates
            counts.cut += len(line.pair.candidates) > self.candidates
        engine = Engine(
            self.model, self.stop_ids, tokenizer=self.tokenizer, slots=min(SLOTS, len(lines))
        )
        texts: dict[int, str | None] = {}
        for event in engine.run(requests):
            if event.finish is not None:
                is_whole = event.finish == "stop" and event.answer.text.strip()
                texts[event.request] = event.answer.text.strip() if is_whole else None
        found = []
        for number, line in enumerate(lines):
            text = texts[number]
            counts.replaced += text is None
            found.append(Corrected(line.pair.candidates[0] if text is None else text))
        return found

    def _prompt(self, line: Line) -> list[int]:
        question = prompt_of(line.pair.exactly(self.candidates))
        rendered = render(
            [{"role": "user", "content": question}],
            enable_thinking=False,
            add_generation_prompt=True,
        )
        return self.tokenizer.encode(rendered.text, specials=True)
