"""Rollouts: answers of the policy to a batch of tasks, with their verdicts."""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.answering import Answerer, Answering, seed_of
from nemotron.posttrain.config import RlConfig, RolloutConfig
from nemotron.posttrain.environments.base import Response, Verdict
from nemotron.posttrain.replay import Experts
from nemotron.posttrain.tasks import Task, Tasks
from nemotron.posttrain.turns import Conversation, Limits, begin, go_on
from nemotron.posttrain.verify import Verifiers


@dataclass
class Rollout:
    """One answer to a task, and all that is needed to learn from it or to verify it again."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: Task
    group: int
    """Number of the prompt in its rollout batch."""
    tokens: list[int]
    logprobs: list[float]
    """Of each token under the policy and temperature that it was sampled with; 0 if forced."""
    forced: list[bool]
    """Whether a token was not the policy's choice; nothing is learned from such tokens."""
    is_truncated: bool
    version: int
    """Optimizer steps that the weights of the first token had seen."""
    response: Response
    verdict: Verdict
    advantage: float = 0.0
    old_logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token under the trainer's weights before the first update on this batch."""
    reference_logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token under the weights that the run began with; empty if nothing needs them."""
    teacher_logprobs: list[float] = dataclasses.field(default_factory=list)
    """Of each token under the teacher's weights; empty without a teacher."""
    is_masked: bool = False
    """Whether the answer is left out of the loss."""
    turns: int = 1
    """Answers of the policy; between them stands, forced, what tools said."""
    tool_calls: int = 0
    """Calls that it made in all of them."""
    tool_fault: str | None = None
    """Why tools did not answer; the verdict then is a fault."""
    experts: str = ""
    """Experts of each token of prompt and answer but the last (`replay.Experts`); empty if they
    were not recorded."""
    versions: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    """From which token on which version of the weights was used; empty: `version` for all."""

    @property
    def token_versions(self) -> list[int]:
        """The version of the weights for each token."""
        from_place = dict(self.versions)
        versions, version = [], self.version
        for place in range(len(self.tokens)):
            version = from_place.get(place, version)
            versions.append(version)
        return versions

    @property
    def token_advantages(self) -> list[float]:
        """The advantage of each token: that of the answer, or what the teacher says of the token.

        Source: NVIDIA-NeMo/RL, on-policy distillation: log teacher - log policy, per token.
        """
        if not self.teacher_logprobs:
            return [self.advantage] * len(self.tokens)
        pairs = zip(self.teacher_logprobs, self.old_logprobs, strict=True)
        return [teacher - old for teacher, old in pairs]

    def as_line(self) -> str:
        """Return the rollout as JSON, a line of a rollout file."""
        return json.dumps(self, default=vars, ensure_ascii=False)

    @classmethod
    def of_json(cls, values: Any) -> "Rollout":  # Any: whatever stands in a file of others
        """Return what `as_line` wrote.

        Raises:
            ValueError: when a key is unknown, absent or of another type, or lists differ in length.
        """
        found = _adapter().validate_python(values)
        scored = (found.old_logprobs, found.reference_logprobs, found.teacher_logprobs)
        lengths = {len(found.logprobs), len(found.forced), *(len(x) for x in scored if x)}
        if lengths != {len(found.tokens)}:
            raise ValueError("lists of values of each token differ in length")
        return found


@functools.cache
def _adapter() -> TypeAdapter[Rollout]:
    return TypeAdapter(Rollout)


@dataclass
class Draft:
    """Rollouts of some tasks while they are written."""

    places: list[tuple[int, Task, int]]
    """Of each one the number of its prompt, its task, and its number among the prompt's answers."""
    talks: list[Conversation]
    version: int | None = None
    """Of the weights that they begin with; absent before they begin."""
    answerer: Answerer | None = None
    """Holds the states of answers that go on from them."""


class Sampler:
    """Answers tasks with a model in training, which it leaves as it is, and has them verified."""

    def __init__(self, config: RlConfig, tasks: Tasks, verifiers: Verifiers) -> None:
        self._config, self._prompts, self.verifiers = config.rollout, tasks.prompts, verifiers
        self._how = answering(config.rollout, tasks)
        self._experts = Experts.of(config)
        self._limits = Limits(
            config.rollout.max_turns,
            config.data.seq_len + 1,
            config.rollout.verify_timeout_s,
            experts=self._experts is not None,
        )
        self.verify_s = 0.0
        """Seconds in which the answers of the last batch were judged."""

    def answerer(self, model: HybridLM) -> Answerer:
        """Return what answers with the weights that the model has now."""
        return Answerer(model, self._prompts, self._how)

    def draft(self, tasks: Sequence[tuple[int, Task]], seed: str) -> Draft:
        """Return rollouts of tasks, each given with its number in the batch, before they begin.

        The random numbers of an answer depend on `seed`, the number of its task and its own.
        """
        size, at = self._config.num_generations_per_prompt, self._config.temperature
        places = [(number, task, k) for number, task in tasks for k in range(size)]
        talks = [
            Conversation.about(
                task.row, task.prompt, Sampling(at, seed=seed_of(seed, number) + k), self._limits
            )
            for number, task, k in places
        ]
        return Draft(places, talks)

    def write(self, draft: Draft, model: HybridLM, version: int, until: int | None = None) -> None:
        """Let a model answer, until each answer has ended or has so many sampled tokens."""
        if draft.version is None:
            begin(self.verifiers, draft.talks)
            draft.version = version
        if not any(talk.goes_on(until) for talk in draft.talks):
            return
        if draft.answerer is None:
            keeps = until is not None and not self._config.recompute_kv_cache_after_weight_updates
            how = dataclasses.replace(self._how, keep_states=keeps)
            draft.answerer = Answerer(model, self._prompts, how, version)
        else:
            draft.answerer.update(model, version)
        size = self._config.num_generations_per_prompt
        go_on(draft.answerer, self.verifiers, draft.talks, size, until)
        if not draft.answerer.how.keep_states:
            draft.answerer = None

    def judge(self, draft: Draft) -> list[Rollout]:
        """Return the rollouts of answers that have all ended, with their verdicts."""
        talks = draft.talks
        start = time.perf_counter()
        verdicts = self.verifiers.verify(
            [talk.row for talk in talks],
            [talk.response for talk in talks],
            [talk.state for talk in talks],
            self._config.verify_timeout_s,
            [talk.fault for talk in talks],
        )
        self.verify_s = time.perf_counter() - start
        return [
            self._rollout(task, number, talk, verdict, draft.version or 0)
            for (number, task, _), talk, verdict in zip(draft.places, talks, verdicts, strict=True)
        ]

    def _rollout(
        self, task: Task, group: int, talk: Conversation, verdict: Verdict, version: int
    ) -> Rollout:
        said = talk.transcript
        experts = said.experts
        return Rollout(
            task=task,
            group=group,
            tokens=said.tokens,
            logprobs=said.logprobs,
            forced=said.forced,
            is_truncated=talk.response.is_truncated,
            version=version,
            versions=said.versions,
            response=talk.response,
            verdict=verdict,
            experts="" if experts is None or not self._experts else self._experts.encode(experts),
            turns=talk.turns,
            tool_calls=talk.num_calls,
            tool_fault=talk.fault,
        )


def rollout_lines(rollouts: Sequence[Rollout]) -> str:
    """Return a rollout file: a line of JSON for each rollout."""
    return "".join(each.as_line() + "\n" for each in rollouts)


def answering(config: RolloutConfig, tasks: Tasks) -> Answering:
    """Return how the tasks of a recipe are answered."""
    tokens, grace = config.reasoning_budget, config.reasoning_grace
    budget = None if tokens is None else ReasoningBudget.of(tasks.tokenizer, tokens, grace)
    return Answering(config.max_new_tokens, config.slots, budget)
