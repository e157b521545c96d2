"""Offers an environment over HTTP, as a resources server of NVIDIA-NeMo/Gym does."""

import http.server
import json
import secrets
import threading
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow, Environment
from nemotron.posttrain.environments.wire import read_response, write_verdict

COOKIE = "session"
MAX_BODY = 64 * 2**20
"""Bytes of the largest request."""
MAX_SESSIONS = 10_000
"""Conversations that are kept; the oldest ones are forgotten first."""
WAIT_S = 60.0
"""Time in which a client has to send its request."""


class EnvironmentServer:
    """An environment at an address, in threads of this process, until it is closed."""

    def __init__(self, environment: Environment, host: str, port: int) -> None:
        self._sessions = _Sessions()
        handler = type("Handler", (_Handler,), {"env": environment, "sessions": self._sessions})
        try:
            self._server = http.server.ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            raise UserError(
                f"cannot be listened on: {error.strerror}; give another port, or 0 for a free one.",
                where=f"environments: {host}:{port}",
            ) from None
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Address that clients use."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> "EnvironmentServer":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_env(
    environment: Environment, host: str = "127.0.0.1", port: int = 0
) -> EnvironmentServer:
    """Start to offer an environment over HTTP; port 0 takes a free one.

    `POST /seed_session` (a row) begins a conversation and answers with its cookie, `POST /TOOL`
    (arguments) runs a tool, `POST /verify` (a row with `response`) returns the body with `reward`;
    a sample that could not be judged has `mask_sample` and `failure_reason`. There is no
    authentication: offer it to machines that you trust.

    Raises:
        UserError: when the address is taken.
    """
    return EnvironmentServer(environment, host, port)


class _Sessions:
    """States of conversations by the value of their cookie."""

    def __init__(self) -> None:
        self._states: OrderedDict[str, Any] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def begin(self, state: Any) -> str:
        """Keep a state and return its new name."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._states[name], self._locks[name] = state, threading.Lock()
            while len(self._states) > MAX_SESSIONS:
                forgotten, _ = self._states.popitem(last=False)
                del self._locks[forgotten]
        return name

    def find(self, name: str) -> tuple[Any, threading.Lock] | None:
        """Return a state, and the lock to hold while it changes."""
        with self._lock:
            return (self._states[name], self._locks[name]) if name in self._states else None


class _BadRequest(ValueError):
    """What a client sent is wrong; says what would be right."""


class _Handler(http.server.BaseHTTPRequestHandler):
    env: Environment
    sessions: _Sessions
    timeout = WAIT_S  # of each read; the standard library applies it to the connection

    def do_GET(self) -> None:
        if self.path == "/reverify_mode":
            self._send(200, json.dumps("stateless"))
        else:
            self._send(404, _detail(f"there is no {self.path[:100]}"))

    def do_POST(self) -> None:
        try:
            body = self._read()
            name = self.path.split("?")[0].removeprefix("/")
            if name == "seed_session":
                self._seed(body)
            elif name == "verify":
                self._verify(body)
            else:
                self._call(name, body)
        except (_BadRequest, BadRow) as error:
            self._send(422, _detail(str(error)))

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: a line for each call would bury the log of the run."""

    def _read(self) -> Any:
        length = self.headers.get("Content-Length", "")
        # int() refuses thousands of digits, and letters of other scripts that count as digits
        is_number = length.isascii() and length.isdigit() and len(length) < 20
        if not is_number or int(length) > MAX_BODY:
            raise _BadRequest(f"Content-Length = {length[:60]!r}; send at most {MAX_BODY}")
        try:
            return json.loads(self.rfile.read(int(length)) or b"{}")
        except (ValueError, RecursionError):
            raise _BadRequest("the body is not JSON") from None

    def _seed(self, body: Any) -> None:
        row = _row(body)
        self.env.check(row)
        name = self.sessions.begin(self.env.seed(row))
        self._send(200, "{}", cookie=f"{COOKIE}={name}; HttpOnly; Path=/")

    def _call(self, name: str, body: Any) -> None:
        found = self._session()
        if found is None:
            self._send(400, _detail("there is no such session; call /seed_session first"))
            return
        state, lock = found
        with lock:
            said = self.env.call(state, name, body)
        self._send(200, said, kind="text/plain; charset=utf-8")

    def _verify(self, body: Any) -> None:
        row = _row(body)
        try:
            response = read_response(row.get("response"))
        except ValueError as error:
            raise _BadRequest(str(error)) from None
        self.env.check(row)
        found = self._session()
        verdict = self.env.verify(row, response, found[0] if found else self.env.seed(row))
        self._send(200, json.dumps({**row, **write_verdict(verdict)}))

    def _session(self) -> tuple[Any, threading.Lock] | None:
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            return None
        return self.sessions.find(morsel.value) if morsel else None

    def _send(
        self, status: int, text: str, kind: str = "application/json", cookie: str | None = None
    ) -> None:
        content = text.encode(errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if cookie is not None:
            self.send_header("Set-Cookie", cookie)
        self.end_headers()
        self.wfile.write(content)


def _detail(text: str) -> str:
    return json.dumps({"detail": text})


def _row(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise _BadRequest("the body is not a JSON object; send a row")
    return body
