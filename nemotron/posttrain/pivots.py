"""Pivots of expert trajectories: turns at which a model now acts rightly and now wrongly."""

import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.data.chat.calls import read_calls
from nemotron.data.chat.check import Message, call_arguments, check_messages, is_learned, text_of
from nemotron.data.chat.forms import openai_messages, openai_tools
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.files import parse_json, read_regular, write_text
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.answering import Answerer, Asked, seed_of
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.environments.base import Response, Row, messages_of, params_of
from nemotron.posttrain.environments.file_rows import LARGEST_DATA
from nemotron.posttrain.environments.pivot import Pivot
from nemotron.posttrain.rollout import answering
from nemotron.posttrain.tasks import Tasks
from nemotron.posttrain.verify import Verifiers
from nemotron.precision.apply import DTYPES

AT_ONCE = 64
"""Turns whose answers are drawn and judged together."""


@dataclass
class Found:
    """What became of the turns of some trajectories."""

    turns: int = 0
    too_long: int = 0
    """Turns whose prompt leaves no room in a row."""
    always: int = 0
    """Turns of which every answer had the same reward, or the mean was too high."""
    faults: int = 0
    """Turns of which an answer could not be judged."""
    pivots: int = 0

    def __str__(self) -> str:
        return (
            f"{self.pivots:,} pivots of {self.turns:,} turns; left out: {self.always:,} that are "
            f"always right, always wrong or too easy, {self.too_long:,} that are too long, "
            f"{self.faults:,} that could not be judged"
        )


def write_pivots(
    model: HybridLM,
    config: RlConfig,
    trajectories: Path,
    out: Path,
    *,
    samples: int,
    max_reward: float,
) -> Found:
    """Answer each turn of each trajectory anew, and write those whose rewards differ as rows.

    A turn is one in which the expert called tools. It is a pivot if the rewards of `samples`
    answers differ and their mean is at most `max_reward`; it is noted with them in the row.

    Raises:
        UserError: when a trajectory is none, or the recipe has no environment `pivot`.
    """
    if not any(entry.name == Pivot.name for entry in config.rollout.environments):
        raise UserError(
            "has no environment pivot, which judges the answers; add it.",
            key="rollout.environments",
        )
    tasks = Tasks(config)
    model = model.to(find_device(config.device)).requires_grad_(False)
    model.compute_dtype = DTYPES[config.precision.compute]
    answerer = Answerer(model, tasks.prompts, answering(config.rollout, tasks))
    found, lines = Found(), list[str]()
    rows = read_turns(trajectories)
    with tasks.verifiers() as verifiers:
        while part := list(itertools.islice(rows, AT_ONCE)):
            found.turns += len(part)
            lines += _pivots(part, answerer, verifiers, config, samples, max_reward, found)
    if not lines:
        raise UserError(f"has no pivots ({found}); nothing was written.", where=str(trajectories))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(lines))
    return found


def turns_of(row: Message) -> Iterator[Row]:
    """Yield a row for each turn of a conversation in which the assistant called tools.

    Raises:
        ValueError: when the row is not a conversation, in one sentence.
    """
    messages, tools = openai_messages(row.get("messages")), openai_tools(row.get("tools"))
    check_messages(messages, tools)
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if calls and is_learned(message):
            expected = [_call(call) for call in calls]
            yield {
                "responses_create_params": {
                    "input": [item for before in messages[:place] for item in _items(before)],
                    "tools": list(tools or []),
                },
                "agent_ref": {"type": "responses_api_agents", "name": Pivot.name},
                "expected_action": expected[0] if len(expected) == 1 else expected,
            }


def _call(call: Message) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = json.dumps(dict(call_arguments(function, "tool_calls")), ensure_ascii=False)
    return {"type": "function_call", "name": function["name"], "arguments": arguments}


def _items(message: Message) -> list[dict[str, Any]]:
    """Return a message as items of OpenAI's Responses format; reasoning before it is left out."""
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": "", "output": text_of(message)}]
    said = [{"role": message["role"], "content": text_of(message)}]
    return [*said, *({**_call(c), "call_id": ""} for c in message.get("tool_calls") or [])]


def read_turns(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the turns of all trajectories of a file, each with its number."""
    number = 0
    try:
        content = read_regular(path, LARGEST_DATA)
    except OSError as error:
        rule = f"cannot be read: {error.strerror}; give a file of JSON lines."
        raise UserError(rule, where=str(path), because=error) from None
    # not by splitlines, which also splits at letters that may stand in a text
    for line, text in enumerate(content.split(b"\n"), start=1):
        try:
            row = parse_json(text) if text.strip() else None
            if row is not None and not isinstance(row, dict):
                raise ValueError("is not a JSON object.")
            turns = list(turns_of(row)) if row is not None else []
        except UnicodeDecodeError:
            rule = "is not UTF-8 text; give a file of JSON lines."
            raise UserError(rule, where=f"{path}:{line}") from None
        except ValueError as problem:
            raise UserError(str(problem), where=f"{path}:{line}") from None
        for turn in turns:
            yield number, turn
            number += 1


def _pivots(
    turns: Sequence[tuple[int, Row]],
    answerer: Answerer,
    verifiers: Verifiers,
    config: RlConfig,
    samples: int,
    max_reward: float,
    found: Found,
) -> Iterator[str]:
    """Yield the rows that are pivots, as lines."""
    rollout = config.rollout
    asked: list[tuple[Row, Asked]] = []
    for number, row in turns:
        prompt = answerer.prompts.write(messages_of(row), params_of(row)["tools"])
        if len(prompt) + rollout.max_new_tokens > config.data.seq_len + 1:
            found.too_long += 1
            continue
        seed = seed_of(f"{config.seed} pivots", number)
        asked.append((row, Asked(prompt, Sampling(rollout.temperature, seed=seed), samples)))
    answers = answerer.answer([each for _, each in asked])
    rows = [row for row, _ in asked for _ in range(samples)]
    responses = [
        _response(answerer, row, answer.tokens, is_truncated=answer.finish == "length")
        for row, answer in zip(rows, answers, strict=True)
    ]
    states = [None] * len(rows)
    verdicts = verifiers.verify(rows, responses, states, rollout.verify_timeout_s)
    for place, (row, _) in enumerate(asked):
        own = verdicts[place * samples :][:samples]
        if any(verdict.error is not None or verdict.mask for verdict in own):
            found.faults += 1
            continue
        rewards = [verdict.reward for verdict in own]
        mean = statistics.fmean(rewards)
        if len(set(rewards)) == 1 or mean > max_reward:
            found.always += 1
            continue
        found.pivots += 1
        noted = {"rewards": rewards, "mean": mean, "std": statistics.pstdev(rewards)}
        yield json.dumps({**row, "pivot": noted}, ensure_ascii=False) + "\n"


def _response(
    answerer: Answerer, row: Row, tokens: Sequence[int], *, is_truncated: bool
) -> Response:
    """Return an answer with its calls as items; no tool is run."""
    response = answerer.prompts.response(tokens, is_truncated=is_truncated)
    text, calls = read_calls(response.text, params_of(row)["tools"])
    items: list[dict[str, Any]] = [
        {
            "type": "function_call",
            "name": call.name,
            "arguments": json.dumps(dict(call.arguments)),
            "call_id": f"call_{place}",
        }
        for place, call in enumerate(calls)
    ]
    if text or not calls:
        content = [{"type": "output_text", "text": text}]
        items.insert(0, {"type": "message", "content": content})
    return Response(text, response.reasoning, tuple(items), is_truncated)
