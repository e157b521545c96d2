"""Answers to rows of environments: drawn, judged, and brought into one form."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemotron.generate.sampling import Sampling
from nemotron.posttrain.answering import Answerer, Asked, seed_of
from nemotron.posttrain.environments.base import Response, Row, Verdict, params_of
from nemotron.posttrain.suites.likelihood import likeliest
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.turns import MAX_TURNS, Conversation, Limits, converse
from nemotron.posttrain.verify import Verifiers


@dataclass(frozen=True)
class Item:
    """A row to answer."""

    task: str
    number: int
    """Of the row within its task."""
    row: Row
    prompt: tuple[int, ...]
    by_likelihood: bool = False
    """Whether the likeliest option is the answer, in place of a generated one."""


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn and judged."""

    samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    verify_timeout_s: float = 10.0
    budget: int | None = None
    """Noted with each sample."""
    max_turns: int = MAX_TURNS
    """Answers to a row with tools."""
    max_tokens: int | None = None
    """Tokens of a whole conversation with tools; absent: no limit."""


@dataclass(frozen=True)
class _Given:
    """An answer before its verdict."""

    response: Response
    num_tokens: int
    is_truncated: bool
    state: Any = None  # Any: JSON, where the tools are at the end
    fault: str | None = None
    """Why tools did not answer."""


def examine(
    answerer: Answerer,
    verifiers: Verifiers,
    items: Sequence[Item],
    how: Drawing,
) -> list[Sample]:
    """Return the judged answers to the rows, samples of one row side by side.

    The random numbers of an answer depend on the seed, its task, its row's number and its own, and
    on nothing else. Tools of rows that offer some are run by the processes of `verifiers`.
    """
    chosen = [item for item in items if item.by_likelihood]
    talks = [item for item in items if not item.by_likelihood and _tools(item)]
    plain = [item for item in items if not item.by_likelihood and not _tools(item)]
    given = _answers(answerer, plain, how)
    given |= _conversations(answerer, verifiers, talks, how)
    asked = [item for item in items if not item.by_likelihood]
    every = [(item, k, answer) for item in asked for k, answer in enumerate(given[_key(item)])]
    verdicts = verifiers.verify(
        [item.row for item, _, _ in every],
        [answer.response for _, _, answer in every],
        [answer.state for _, _, answer in every],
        how.verify_timeout_s,
        [answer.fault for _, _, answer in every],
    )
    found = {_key(item): [likeliest(answerer, item.task, item.number, item.row)] for item in chosen}
    for (item, k, answer), verdict in zip(every, verdicts, strict=True):
        found.setdefault(_key(item), []).append(_sample(item, k, answer, verdict))
    samples = [sample for item in items for sample in found[_key(item)]]
    return [replace(sample, budget=how.budget) for sample in samples]


def _key(item: Item) -> tuple[str, int]:
    return item.task, item.number


def _tools(item: Item) -> list[dict[str, Any]]:
    return params_of(item.row).get("tools") or []


def _seed(item: Item, how: Drawing) -> int:
    return seed_of(f"{how.seed} {item.task}", item.number)


def _answers(
    answerer: Answerer, items: Sequence[Item], how: Drawing
) -> dict[tuple[str, int], list[_Given]]:
    """Return the answers to rows without tools, each prompt read once."""
    asked = [
        Asked(item.prompt, Sampling(how.temperature, seed=_seed(item, how)), how.samples)
        for item in items
    ]
    answers = answerer.answer(asked)
    given: dict[tuple[str, int], list[_Given]] = {}
    pairs = [item for item in items for _ in range(how.samples)]
    for item, answer in zip(pairs, answers, strict=True):
        is_truncated = answer.finish == "length"
        response = answerer.prompts.response(answer.tokens, is_truncated=is_truncated)
        given.setdefault(_key(item), []).append(_Given(response, len(answer.tokens), is_truncated))
    return given


def _conversations(
    answerer: Answerer, verifiers: Verifiers, items: Sequence[Item], how: Drawing
) -> dict[tuple[str, int], list[_Given]]:
    """Return the answers to rows with tools, over as many turns as they take."""
    pairs = [(item, k) for item in items for k in range(how.samples)]
    limits = Limits(how.max_turns, how.max_tokens, how.verify_timeout_s)
    talks = [
        Conversation.about(
            item.row,
            item.prompt,
            Sampling(how.temperature, seed=_seed(item, how) + k),
            limits,
        )
        for item, k in pairs
    ]
    converse(answerer, verifiers, talks, how.samples)
    given: dict[tuple[str, int], list[_Given]] = {}
    for (item, _), talk in zip(pairs, talks, strict=True):
        answer = _Given(
            talk.response,
            talk.transcript.num_sampled,
            talk.response.is_truncated,
            talk.state,
            talk.fault,
        )
        given.setdefault(_key(item), []).append(answer)
    return given


def _sample(item: Item, number: int, answer: _Given, verdict: Verdict) -> Sample:
    return Sample(
        item.task,
        item.number,
        number,
        item.row,
        answer.response,
        verdict,
        answer.num_tokens,
        answer.is_truncated,
    )
