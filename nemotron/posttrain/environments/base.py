"""What an environment is: tasks as rows, tools, and a verdict about each answer.

Rows, responses and verdicts have the form of NVIDIA-NeMo/Gym, so that its data and servers fit.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Row = dict[str, Any]
"""A task: `responses_create_params` with the prompt (OpenAI's Responses format: `input`, `tools`),
`agent_ref` naming the environment, and what its verifier needs, at the top level or under
`verifier_metadata`."""


class BadRow(ValueError):
    """A row lacks what its environment needs; says which key, and what would be right."""


@dataclass(frozen=True)
class Response:
    """What a model answered to a row, over all its turns."""

    text: str
    """The last message, without reasoning and special tokens."""
    reasoning: str = ""
    """Reasoning before the last message."""
    output: tuple[dict[str, Any], ...] = ()
    """Everything in order, as items of OpenAI's Responses format: `reasoning`, `message`,
    `function_call` and `function_call_output`."""
    is_truncated: bool = False
    """Whether the answer ended because it reached the largest length."""


@dataclass(frozen=True)
class Call:
    """A call of a tool that a model made."""

    name: str
    arguments: str
    """JSON as the model wrote it, which may be malformed."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says about a response."""

    reward: float
    components: dict[str, float] = field(default_factory=dict)
    """Rewards by name, where there are several."""
    extracted: str | None = None
    """The part of the answer that was compared."""
    error: str | None = None
    """A fault of the verifier itself; the sample then is left out of the loss, never scored."""
    mask: bool = False
    """Whether the sample is left out of the loss for another reason."""


class Environment(Protocol):
    """Generates tasks, offers tools and judges answers.

    `rows` and `verify` are deterministic and hold no state of a run: the same arguments give the
    same result in any process, so that stored rollouts can be verified again.
    """

    @property
    def name(self) -> str:
        """Name in recipes, and `agent_ref.name` of its rows."""
        ...

    @property
    def max_level(self) -> int:
        """Highest level of its tasks, from 0; 0 where tasks have no levels."""
        ...

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield so many tasks; a larger `level` makes them harder."""
        ...

    def check(self, row: Row) -> None:
        """Check that a row has what `verify` reads.

        Raises:
            BadRow: when it does not.
        """
        ...

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the tools that the model may call, as OpenAI's Responses format describes them."""
        ...

    def seed(self, row: Row) -> Any:
        """Return the state in which the conversation about a row begins; None without tools.

        A state is a JSON value: it is stored in checkpoints, and sent to other processes.
        """
        ...

    def call(self, state: Any, name: str, arguments: dict[str, Any]) -> str:
        """Run a tool, change the state, and return the text that the model reads.

        A wrong name or wrong arguments give a text that says so.
        """
        ...

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Judge the final response."""
        ...


@runtime_checkable
class ReadsFile(Protocol):
    """An environment whose rows stand in a file."""

    def contents(self) -> dict[str, str]:
        """Return the hash of the file, by the option that names it and its path.

        Raises:
            UserError: when it cannot be read.
        """
        ...


class WithoutTools:
    """The part of an environment that has no tools."""

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return nothing: there are none."""
        return []

    def seed(self, row: Row) -> None:
        """Return nothing: there is no state."""

    def call(self, state: None, name: str, arguments: dict[str, Any]) -> str:
        """Say that there is no such tool."""
        return f"error: there is no tool {name}"


def random_of(name: str, seed: int, level: float, number: int) -> random.Random:
    """Return the random numbers of one task, the same in every process and on every machine."""
    return random.Random(f"{name} {seed} {float(level)} {number}")


def whole_level(rng: random.Random, level: float) -> int:
    """Return a whole level; one between two whole ones mixes them in proportion."""
    return int(level) + (rng.random() < level - int(level))


def level_problem(environment: Environment, level: float) -> str | None:
    """Return what is wrong with a level for these tasks, None if nothing is."""
    if level <= environment.max_level:
        return None
    if environment.max_level == 0:
        return f"is a level, but these tasks of {environment.name} have none; leave it out."
    return f"is above {environment.max_level}, the highest level of these tasks; use at most that."


def build_row(environment: str, prompt: str, /, **fields: Any) -> Row:
    """Return a row with one message of the user and the fields of its verifier."""
    return {
        "responses_create_params": {"input": [{"role": "user", "content": prompt}]},
        "agent_ref": {"type": "responses_api_agents", "name": environment},
        **fields,
    }


def environment_of(row: Row) -> str:
    """Return the name of the environment to which a row belongs.

    Raises:
        BadRow: when it names none.
    """
    reference = row.get("agent_ref")
    name = reference.get("name") if isinstance(reference, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow('agent_ref.name is absent; add {"agent_ref": {"name": ENVIRONMENT}}')
    return name


def belonging_to(row: Row, name: str) -> Row:
    """Return a row that names this environment."""
    reference = row.get("agent_ref")
    known = reference if isinstance(reference, dict) else {"type": "responses_api_agents"}
    return row if known.get("name") == name else {**row, "agent_ref": {**known, "name": name}}


def find_field(row: Row, name: str) -> Any:  # Any: any JSON value
    """Return a verifier's field, from the top level or from `verifier_metadata`.

    Raises:
        BadRow: when the row has none.
    """
    for place in (row, row.get("verifier_metadata") or {}):
        if isinstance(place, dict) and name in place:
            return place[name]
    raise BadRow(f"{name} is absent; add it, or under verifier_metadata")


def optional_field(row: Row, name: str, default: Any) -> Any:  # Any: any JSON value
    """Return a verifier's field, or `default` when the row has none."""
    try:
        return find_field(row, name)
    except BadRow:
        return default


def calls_of(response: Response) -> list[Call]:
    """Return the calls of tools in a response, in order."""
    return [
        Call(str(item.get("name")), str(item.get("arguments")))
        for item in response.output
        if item.get("type") == "function_call"
    ]


def demonstrated_call(name: str, arguments: dict[str, Any], said: str) -> tuple[Any, ...]:
    """Return a call of a tool and what it says, as items of a response."""
    call = {"type": "function_call", "name": name, "arguments": json.dumps(arguments)}
    output = {"type": "function_call_output", "call_id": "call_0", "output": said}
    return ({**call, "call_id": "call_0"}, output)


def params_of(row: Row) -> dict[str, Any]:
    """Return what a row asks of the model.

    Raises:
        BadRow: when there is nothing.
    """
    params = row.get("responses_create_params")
    if not isinstance(params, dict) or "input" not in params:
        raise BadRow("responses_create_params.input is absent; add the prompt there")
    return params


def messages_of(row: Row) -> list[dict[str, Any]]:
    """Return the prompt of a row as chat messages; a plain text is a message of the user.

    Reasoning, calls of tools and what they said may stand between messages, as items of OpenAI's
    Responses format.

    Raises:
        BadRow: when there is none.
    """
    given = params_of(row)["input"]
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise BadRow("responses_create_params.input is empty; give a text or a list of messages")
    messages: list[dict[str, Any]] = []
    thought = ""
    for number, item in enumerate(given):
        where = f"responses_create_params.input.{number}"
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "reasoning":
            thought = _text(item.get("summary") or item.get("content"))
            continue
        if kind == "function_call":
            _add_call(messages, item, where)
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": _text(item.get("output"))})
        else:
            messages.append(_message(item, where))
        if thought and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thought
        thought = ""
    return messages


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict) or "role" not in item or "content" not in item:
        raise BadRow(f"{where} lacks role or content")
    role = "system" if item["role"] == "developer" else item["role"]
    if not isinstance(role, str):
        raise BadRow(f"{where}.role is not a text")
    return {"role": role, "content": _text(item["content"])}


def _add_call(messages: list[dict[str, Any]], item: dict[str, Any], where: str) -> None:
    """Add a call to the assistant's message before it, or to one of its own."""
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise BadRow(f"{where} lacks name or arguments; give both as texts")
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise BadRow(f"{where}.arguments is not a JSON object; give one, as a text")
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: Any) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
