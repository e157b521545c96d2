"""`pivot`: the next action of an expert's trajectory, judged by what it does (PivotRL)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron.posttrain.environments.base import (
    BadRow,
    Environment,
    Response,
    Row,
    Verdict,
    WithoutTools,
    calls_of,
    find_field,
    params_of,
)
from nemotron.posttrain.environments.file_rows import FileRows, FromFile


class Pivot(FromFile, WithoutTools):
    """Act as the expert did after the same conversation: one turn, in which no tool is run.

    A row has the conversation, the tools, and `expected_action` as in NVIDIA-NeMo/Gym: a call
    (`type: function_call`, `name`, `arguments`), a message (`type: message`), or a list of calls.
    Calls are equal if the tools are and the arguments are as JSON values, an argument that is left
    out being its schema's default; the order of several calls does not matter. Where a message is
    expected, an answer without calls is right. With `verifier`, the row is judged by that
    environment in place of the comparison.

    Source: Yi et al. 2026, "PivotRL: High Accuracy Agentic Post-Training at Low Compute Cost".
    """

    name = "pivot"

    def __init__(self, data: str | None = None, verifier: Environment | None = None) -> None:
        """`data` is a file of rows, such as `nemotron rl pivots` writes."""
        self._rows = FileRows(self.name, data)
        self._verifier = verifier

    def check(self, row: Row) -> None:
        """Check the expected action, or what the named verifier reads.

        Raises:
            BadRow: when it is absent or names no tool of the row.
        """
        if self._verifier is not None:
            self._verifier.check(row)
            return
        known = _schemas(row)
        for name, _ in expected_calls(row):
            if name not in known:
                raise BadRow(
                    f"expected_action.name = {name!r} is not among the tools of the row; add it to "
                    "responses_create_params.tools"
                )

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the action does what the expert's does, else 0."""
        if self._verifier is not None:
            return self._verifier.verify(row, response, self._verifier.seed(row))
        made = [(call.name, _arguments(call.arguments)) for call in calls_of(response)]
        named = json.dumps(made) if made else None
        if any(arguments is None for _, arguments in made):
            return Verdict(0.0, extracted=named)
        schemas = _schemas(row)
        ours, theirs = (
            sorted(_canonical(name, arguments, schemas) for name, arguments in calls)
            for calls in (made, expected_calls(row))
        )
        is_right = not response.is_truncated and ours == theirs
        return Verdict(float(is_right), extracted=named)


def expected_calls(row: Row) -> list[tuple[str, dict[str, Any]]]:
    """Return the calls that are expected; none where a message is.

    Raises:
        BadRow: when the expected action is neither.
    """
    action = find_field(row, "expected_action")
    calls = []
    for each in action if isinstance(action, list) else [action]:
        kind = each.get("type") if isinstance(each, dict) else None
        if kind == "message":
            continue
        arguments = _arguments(each.get("arguments")) if isinstance(each, dict) else None
        if kind != "function_call" or not isinstance(each.get("name"), str) or arguments is None:
            raise BadRow(
                "expected_action is neither a call nor a message; give type: function_call with "
                "name and arguments, or type: message"
            )
        calls.append((each["name"], arguments))
    return calls


def _schemas(row: Row) -> dict[str, dict[str, Any]]:
    """Return the schemas of the parameters of each tool, by its name."""
    tools = params_of(row).get("tools")
    found: dict[str, dict[str, Any]] = {}
    for tool in tools if isinstance(tools, Sequence) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        parameters = function.get("parameters")
        fields = parameters.get("properties") if isinstance(parameters, dict) else None
        found[str(function.get("name"))] = fields if isinstance(fields, dict) else {}
    return found


def _arguments(given: Any) -> dict[str, Any] | None:  # Any: JSON
    """Return the arguments of a call, which are an object or its JSON text; None of others."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    return given if isinstance(given, dict) else None


def _canonical(
    name: str, arguments: Mapping[str, Any] | None, schemas: Mapping[str, dict[str, Any]]
) -> str:
    """Return a text that is the same for calls that do the same."""
    defaults = {
        key: schema["default"]
        for key, schema in schemas.get(name, {}).items()
        if isinstance(schema, dict) and "default" in schema
    }
    return json.dumps([name, _plain({**defaults, **(arguments or {})})], sort_keys=True)


def _plain(value: Any) -> Any:  # Any: JSON
    """Return a JSON value in which numbers that are equal are written alike."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
