"""Requests to a server that a recipe names, each with a limit on its time and size."""

import http.client
import json
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron.errors import UserError

LONGEST_S = 3600.0
"""Largest limit of one request."""
MAX_ANSWER = 64 * 2**20
"""Bytes of the longest answer of a server."""


class Failed(Exception):
    """A request without a usable answer; completes a sentence about the server."""


@dataclass(frozen=True)
class Answer:
    """What a server sent."""

    status: int
    content: bytes
    set_cookies: tuple[str, ...]

    def check_status(self) -> None:
        """Raise Failed unless the request succeeded."""
        if self.status != 200:
            said = self.content[:200].decode(errors="replace")
            raise Failed(f"answered with status {self.status}: {said}")


class Address:
    """A server's address, and the longest time that one of its answers may take as a whole."""

    def __init__(self, environment: str, key: str, url: str, timeout_s: float) -> None:
        """`key` is the option that names the address.

        Raises:
            UserError: when `url` is not an address, or the time is out of range.
        """
        where = f"environments: {environment}"
        try:
            self._url = urllib.parse.urlsplit(url)
            is_address = self._url.scheme in ("http", "https") and bool(self._url.hostname)
            self._port = self._url.port
        except (ValueError, AttributeError, TypeError):  # also of what is not a text
            is_address = False
        if not is_address:
            rule = "is not an address; give one such as http://127.0.0.1:8000."
            raise UserError(rule, key=key, value=url, where=where)
        if type(timeout_s) not in (int, float) or not 0 < timeout_s <= LONGEST_S:
            rule = f"must be a number above 0 and at most {LONGEST_S:g}."
            raise UserError(rule, key="timeout_s", value=timeout_s, where=where)
        self._timeout_s = timeout_s

    def name(self, path: str) -> str:
        """Return what a sentence about a request begins with."""
        return f"the server {self._url.geturl().rstrip('/')}/{path}"

    def post(self, path: str, body: Any, headers: Mapping[str, str]) -> Answer:  # Any: JSON
        """Send JSON and return the answer, whatever its status.

        Raises:
            Failed: when there is none, it is too long, or it comes too late.
        """
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else None
        connection = (kind or http.client.HTTPConnection)(
            str(self._url.hostname), self._port, timeout=self._timeout_s
        )
        deadline = _Deadline(self._timeout_s)
        try:
            connection.connect()
            deadline.connection = connection.sock
            target = f"{self._url.path.rstrip('/')}/{path}"
            sent = {"Content-Type": "application/json", **headers}
            connection.request("POST", target, json.dumps(body), sent)
            answer = connection.getresponse()
            content = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            if deadline.has_passed or isinstance(error, TimeoutError):
                raise Failed(f"took longer than {self._timeout_s:g} s") from None
            raise Failed(f"did not answer: {error or type(error).__name__}") from None
        finally:
            deadline.cancel()
            connection.close()
        if deadline.has_passed:  # what was read then is cut off
            raise Failed(f"took longer than {self._timeout_s:g} s")
        if len(content) > MAX_ANSWER:
            raise Failed(f"answered with more than {MAX_ANSWER} bytes")
        if answer.length:  # what is left of the length that it announced
            raise Failed("broke off in the middle of its answer")
        return Answer(answer.status, content, tuple(answer.headers.get_all("Set-Cookie", [])))


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
