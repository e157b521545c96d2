"""Conversations that teach to answer without reasoning, or after reasoning that was cut off."""

import random

from nemotron.data.chat.render import Rendered

CLOSE = "</think>"


def cut_reasoning(rendered: Rendered, rng: random.Random) -> Rendered:
    """Cut the reasoning of each supervised turn at the end of a line, and keep the answer.

    Any number of lines stays, but never all. What stays of the reasoning is not supervised, since
    it is what a budget leaves; the closing tag and the answer are. Source: NVIDIA-NeMo/Nemotron:
    docs/nemotron/nano3/sft.md (traces truncated to random budgets).
    """
    text, spans, at = "", [], 0
    for start, stop in rendered.supervised:
        lines, rest = _reasoning_of(rendered.text[start:stop])
        kept = "".join(lines[: rng.randrange(len(lines))]) if lines else ""
        text += rendered.text[at:start] + kept
        spans.append((len(text), len(text) + len(rest)))
        text += rest
        at = stop
    return Rendered(text + rendered.text[at:], tuple(spans))


def _reasoning_of(turn: str) -> tuple[list[str], str]:
    """Return the lines of a turn's reasoning, and what follows from the closing tag on."""
    reasoning, tag, answer = turn.partition(CLOSE)
    return (reasoning.splitlines(keepends=True), tag + answer) if tag else ([], turn)
