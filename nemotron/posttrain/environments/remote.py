"""An environment on another machine, which speaks the protocol of NVIDIA-NeMo/Gym."""

import json
import urllib.parse
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any

from nemotron.posttrain.environments.address import Address, Failed
from nemotron.posttrain.environments.base import (
    Response,
    Row,
    Verdict,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.file_rows import FileRows, FromFile
from nemotron.posttrain.environments.wire import fault, read_gym_verdict, write_response

MAX_TEXT = 100_000
"""Characters of a tool's answer that the model reads."""


class HttpEnv(FromFile):
    """An environment behind an address; a server that fails masks the sample.

    Rows come from `data`, a JSONL file of NVIDIA-NeMo/Gym's form. A state holds the cookies of the
    conversation, and what went wrong in it.

    Raises:
        UserError: when `url` is not an address, or `data` cannot be read.
    """

    def __init__(
        self, name: str, url: str, timeout_s: float = 30.0, data: str | None = None
    ) -> None:
        """`timeout_s` bounds each request as a whole."""
        self.name = name
        self._address = Address(name, "url", url, timeout_s)
        self._rows = FileRows(name, data)

    def check(self, row: Row) -> None:
        """Check the prompt; the server checks the rest.

        Raises:
            BadRow: when there is none.
        """
        messages_of(row)

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the tools that the row offers."""
        tools = params_of(row).get("tools")
        return list(tools) if isinstance(tools, list) else []

    def seed(self, row: Row) -> dict[str, Any]:
        """Begin a conversation and return its cookies."""
        state: dict[str, Any] = {"cookies": {}, "error": None}
        self._ask(state, "seed_session", row)
        return state

    def call(self, state: dict[str, Any], name: str, arguments: Any) -> str:
        """Run a tool on the server; the model reads the answer, also that to a wrong call."""
        path = urllib.parse.quote(name, safe="", errors="replace")
        answer = self._ask(state, path, arguments, every_status=True)
        if answer is None:
            return "error: the tool did not answer"
        return answer.decode(errors="replace")[:MAX_TEXT]

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Return the verdict of the server; a fault if it fails, or failed during the rollout."""
        state = dict(state or {"cookies": {}, "error": None})
        answer = None
        if state["error"] is None:
            answer = self._ask(state, "verify", {**row, "response": write_response(response)})
        if answer is None:
            return fault(state["error"])
        try:
            return read_gym_verdict(json.loads(answer))
        except (ValueError, RecursionError):
            return fault(f"{self._address.name('verify')} answered with what is not JSON")

    def _ask(
        self, state: dict[str, Any], path: str, body: Any, every_status: bool = False
    ) -> bytes | None:
        """Return the body of an answer and keep its cookies; None, and the reason in the state."""
        cookies = state["cookies"]
        pairs = "; ".join(f"{key}={value}" for key, value in cookies.items())
        try:
            answer = self._address.post(path, body, {"Cookie": pairs} if pairs else {})
            if not every_status:
                answer.check_status()
        except Failed as error:
            state["error"] = f"{self._address.name(path)} {error}"
            return None
        state["cookies"] |= _cookies(answer.set_cookies)
        return answer.content


def _cookies(headers: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for header in headers:
        try:
            found |= {name: morsel.value for name, morsel in SimpleCookie(header).items()}
        except CookieError:
            continue
    return found
