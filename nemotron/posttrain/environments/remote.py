"""An environment on another machine, which speaks the protocol of NVIDIA-NeMo/Gym."""

import http.client
import json
import random
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

import xxhash

from nemotron.errors import UserError
from nemotron.files import parse_json, read_regular
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    messages_of,
    params_of,
)
from nemotron.posttrain.environments.wire import fault, read_gym_verdict, write_response

LONGEST_S = 3600.0
"""Largest limit of one request."""
MAX_ANSWER = 64 * 2**20
"""Bytes of the longest answer of a server."""
LARGEST_DATA = 1 << 30
"""Bytes of a file of rows, all of which are held in memory."""
MAX_TEXT = 100_000
"""Characters of a tool's answer that the model reads."""


class HttpEnv:
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
        where = f"environments: {name}"
        try:
            self._url = urllib.parse.urlsplit(url)
            is_address = self._url.scheme in ("http", "https") and bool(self._url.hostname)
            self._port = self._url.port
        except (ValueError, AttributeError, TypeError):  # also of what is not a text
            is_address = False
        if not is_address:
            rule = "is not an address; give one such as http://127.0.0.1:8000."
            raise UserError(rule, key="url", value=url, where=where)
        if type(timeout_s) not in (int, float) or not 0 < timeout_s <= LONGEST_S:
            rule = f"must be a number above 0 and at most {LONGEST_S:g}."
            raise UserError(rule, key="timeout_s", value=timeout_s, where=where)
        if data is not None and not isinstance(data, str):
            raise UserError("must be the path of a file.", key="data", value=data, where=where)
        self._timeout_s = timeout_s
        self._data = data

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield rows of `data` in an order that depends on `seed`, again from the start if needed.

        Raises:
            UserError: when there is no file, or a line of it is not a row.
        """
        found = self._load()
        for number in range(count):
            turn, place = divmod(number, len(found))
            if place == 0:
                order = list(range(len(found)))
                random.Random(f"{self.name} {seed} {turn}").shuffle(order)
            yield found[order[place]]

    def contents(self) -> dict[str, str]:
        """Return the hash of `data`.

        Raises:
            UserError: when there is no such file.
        """
        self._load()
        assert self._data is not None
        digest = xxhash.xxh128(read_regular(Path(self._data), LARGEST_DATA)).hexdigest()
        return {f"rollout.environments.{self.name}.data = {self._data}": digest}

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
            return fault(f"{self._where('verify')} answered with what is not JSON")

    def _where(self, path: str) -> str:
        return f"the server {self._url.geturl().rstrip('/')}/{path}"

    def _ask(
        self, state: dict[str, Any], path: str, body: Any, every_status: bool = False
    ) -> bytes | None:
        """Return the body of an answer and keep its cookies; None, and the reason in the state."""
        try:
            answer = self._post(path, body, state["cookies"])
            if answer.status != 200 and not every_status:
                said = answer.content[:200].decode(errors="replace")
                raise _Failed(f"answered with status {answer.status}: {said}")
        except _Failed as error:
            state["error"] = f"{self._where(path)} {error}"
            return None
        state["cookies"] |= answer.cookies
        return answer.content

    def _post(self, path: str, body: Any, cookies: dict[str, str]) -> "_Answer":
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else None
        connection = (kind or http.client.HTTPConnection)(
            str(self._url.hostname), self._port, timeout=self._timeout_s
        )
        headers = {"Content-Type": "application/json"}
        if cookies:
            headers["Cookie"] = "; ".join(f"{key}={value}" for key, value in cookies.items())
        deadline = _Deadline(self._timeout_s)
        try:
            connection.connect()
            deadline.connection = connection.sock
            target = f"{self._url.path.rstrip('/')}/{path}"
            connection.request("POST", target, json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if deadline.has_passed or isinstance(error, TimeoutError):
                raise _Failed(f"took longer than {self._timeout_s:g} s") from None
            raise _Failed(f"did not answer: {error or type(error).__name__}") from None
        finally:
            deadline.cancel()
            connection.close()
        if deadline.has_passed:  # what was read then is cut off
            raise _Failed(f"took longer than {self._timeout_s:g} s")
        if len(content) > MAX_ANSWER:
            raise _Failed(f"answered with more than {MAX_ANSWER} bytes")
        if answer.length:  # what is left of the length that it announced
            raise _Failed("broke off in the middle of its answer")
        return _Answer(answer.status, content, _cookies(answer.headers.get_all("Set-Cookie", [])))

    def _load(self) -> list[Row]:
        where = f"environments: {self.name}"
        if self._data is None:
            rule = "is absent; give the path of a JSONL file of rows."
            raise UserError(rule, key="data", where=where)
        rows = []
        try:
            # not by splitlines, which also splits at letters that may stand in a text
            for line in read_regular(Path(self._data), LARGEST_DATA).split(b"\n"):
                if line.strip():
                    rows.append(_parse_row(line))
        except (OSError, ValueError) as error:
            rule = f"cannot be read: row {len(rows)}: {error}."
            raise UserError(rule, key="data", value=Path(self._data), where=where) from None
        if not rows:
            raise UserError("has no rows.", key="data", value=self._data, where=where)
        return [{**row, "agent_ref": {**_reference(row), "name": self.name}} for row in rows]


@dataclass(frozen=True)
class _Answer:
    status: int
    content: bytes
    cookies: dict[str, str]


class _Failed(Exception):
    """A request without a usable answer; completes a sentence about the server."""


class _Deadline:
    """Ends a connection after a time, however slowly the other side goes on sending."""

    def __init__(self, timeout_s: float) -> None:
        self.has_passed = False
        self.connection: socket.socket | None = None
        """What is ended; until it is set, connecting has a limit of its own."""
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def cancel(self) -> None:
        """Do nothing from now on."""
        self._timer.cancel()
        self._timer.join()

    def _end(self) -> None:
        self.has_passed = True
        if self.connection is not None:
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it ended by itself
                return


def _parse_row(line: bytes) -> Row:
    """Return a row whose prompt and tools have their form.

    Raises:
        ValueError: when it is none.
    """
    row = parse_json(line)
    if not isinstance(row, dict):
        raise BadRow("it is not a JSON object")
    messages_of(row)
    return row


def _reference(row: Row) -> dict[str, Any]:
    found = row.get("agent_ref")
    return dict(found) if isinstance(found, dict) else {"type": "responses_api_agents"}


def _cookies(headers: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for header in headers:
        try:
            found |= {name: morsel.value for name, morsel in SimpleCookie(header).items()}
        except CookieError:
            continue
    return found
