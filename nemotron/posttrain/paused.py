"""Answers that wait for new weights, as they stand in a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from nemotron.generate.request import Begun
from nemotron.posttrain.environments.base import Response
from nemotron.posttrain.replay import Experts
from nemotron.posttrain.rollout import Draft, Sampler
from nemotron.posttrain.tasks import Task
from nemotron.posttrain.turns import Conversation


@dataclass(frozen=True)
class _Paused:
    """A conversation that goes on, or has ended and waits for those that do."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    group: int
    number: int
    task: Task
    version: int
    tokens: list[int]
    logprobs: list[float]
    forced: list[bool]
    versions: list[tuple[int, int]]
    num_sampled: int
    experts: str
    state: Any  # JSON, what the environment makes of it
    runs_tools: bool
    items: list[dict[str, Any]]
    turns: int
    num_calls: int
    response: Response
    fault: str | None
    is_over: bool
    begun: Begun | None


@cache
def _adapter() -> TypeAdapter[_Paused]:
    return TypeAdapter(_Paused)


class PausedAnswers:
    """Writes down what a sampler has written of a batch, and makes it anew."""

    def __init__(self, sampler: Sampler, experts: Experts | None) -> None:
        self._sampler, self._experts = sampler, experts

    def save(self, draft: Draft) -> list[dict[str, Any]]:  # Any: nested JSON
        """Return what `restore` reads."""
        pairs = zip(draft.places, draft.talks, strict=True)
        return [
            _adapter().dump_python(self._paused(*place, talk, draft.version or 0), mode="json")
            for place, talk in pairs
        ]

    def _paused(
        self, group: int, task: Task, number: int, talk: Conversation, version: int
    ) -> _Paused:
        said = talk.transcript
        chosen = said.experts
        return _Paused(
            group,
            number,
            task,
            version,
            said.tokens,
            said.logprobs,
            said.forced,
            said.versions,
            said.num_sampled,
            "" if chosen is None or self._experts is None else self._experts.encode(chosen),
            talk.state,
            talk.runs_tools,
            talk.items,
            talk.turns,
            talk.num_calls,
            talk.response,
            talk.fault,
            talk.is_over,
            talk.begun,
        )

    def restore(
        self, saved: Sequence[Any], seed: str, rank: int, world: int, vocab_size: int
    ) -> Draft:
        """Return the share of a rank of what all ranks had written.

        Raises:
            ValueError: when it is not what `save` returns.
        """
        found = [_adapter().validate_python(values) for values in saved]
        own = [paused for paused in found if paused.group % world == rank]
        tasks = {paused.group: paused.task for paused in own}
        draft = self._sampler.draft(list(tasks.items()), seed)
        places = [(group, number) for group, _, number in draft.places]
        if places != [(paused.group, paused.number) for paused in own]:
            raise ValueError("answers are not those of the recipe")
        for paused, talk in zip(own, draft.talks, strict=True):
            self._go_back(talk, paused, vocab_size)
            draft.version = paused.version
        return draft

    def _go_back(self, talk: Conversation, paused: _Paused, vocab_size: int) -> None:
        begun = paused.begun or Begun((), (), (), ())
        for each in (paused, begun):
            if not len(each.tokens) == len(each.logprobs) == len(each.forced):
                raise ValueError("lists of values of each token differ in length")
        ids = (*paused.task.prompt, *paused.tokens, *begun.tokens)
        if not all(0 <= token < vocab_size for token in ids):
            raise ValueError("an id is not in the vocabulary")
        said = talk.transcript
        said.tokens, said.logprobs = paused.tokens, paused.logprobs
        said.forced, said.versions = paused.forced, paused.versions
        said.num_sampled = paused.num_sampled
        if self._experts is not None and paused.experts:
            said.add_experts(self._experts.decode(paused.experts))
        talk.state, talk.runs_tools, talk.items = paused.state, paused.runs_tools, paused.items
        talk.turns, talk.num_calls, talk.response = paused.turns, paused.num_calls, paused.response
        talk.fault, talk.is_over, talk.begun = paused.fault, paused.is_over, paused.begun
