"""What a client did wrong, as one sentence in the form of OpenAI's errors."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from nemotron.errors import show_value

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names of kinds of errors, by status; others below 500 are `invalid_request_error`."""


class ApiError(Exception):
    """A request that cannot be answered; `param` is the field that is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:  # Any: JSON
        """Return the error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def explain_request(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Return the first thing that is wrong with a request as one sentence."""
    first = _most_fitting(error.errors(include_url=False, include_context=False))
    if first["type"] == "json_invalid":
        reason = first["msg"].removeprefix("Invalid JSON: ")
        return ApiError(400, f"the body is not valid JSON: {_line(reason)}.")
    if not first["loc"]:
        return ApiError(400, f"the request is wrong: {_line(_reason(first))}.")
    key = str(first["loc"][0])
    place = key + "".join(_step(part) for part in first["loc"][1:])
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing; give it.", param=key)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, 1) if key == place else []
        advice = f"did you mean {near[0]}?" if near else "leave it out."
        return ApiError(400, f"{_cut(place)} is not a known field; {advice}", param=_cut(key))
    value = _line(show_value(first["input"]))
    return ApiError(400, f"{_cut(place)} = {value} is wrong: {_line(_reason(first))}.", param=key)


def _most_fitting(errors: Sequence[Any]) -> Any:  # Any: pydantic's records
    """Return what is wrong with the first wrong field, by the alternative that it comes nearest."""
    of_field = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]

    def distance(error: Any) -> tuple[int, bool]:  # Any: pydantic's record
        depth = sum(bool(_step(part)) for part in error["loc"])
        return -depth, error["type"].endswith("_type")

    return min(of_field, key=distance)


def _step(part: str | int) -> str:
    if isinstance(part, int):
        return f"[{part}]"
    # the alternatives of a union, and a validator around one, are no part of the request
    is_kind = part[:1].isupper() or "-" in part or part in ("str", "int", "float", "bool")
    return "" if "[" in part or is_kind else f".{part}"


def _reason(error: Any) -> str:  # Any: pydantic's record
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    if error["type"] == "literal_error":  # its values are written as Python writes them
        reason = reason.replace("False", "false").replace("True", "true")
    return reason[:1].lower() + reason[1:]


def _line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str) -> str:
    return _line(show_value(text))
