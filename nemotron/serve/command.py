"""What `nemotron serve` does once the model is loaded."""

import logging
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import uvicorn

from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.serve.access import Access, is_loopback
from nemotron.serve.app import Server
from nemotron.serve.translate import Translator
from nemotron.serve.worker import Worker
from nemotron.terminal import say

LEEWAY_S = 3
"""Seconds in which streams that were ended may send their last events."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    key: str | None
    """Without one, whoever reaches the port may ask."""

    def __post_init__(self) -> None:
        if self.key is not None and (not self.key.isascii() or not self.key.strip()):
            raise UserError(
                "must be ASCII text that is not empty; give another.", key="the API key"
            )


class _Uvicorn(uvicorn.Server):
    """Ends the requests that are open too long after a signal."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace_s: float) -> None:
        super().__init__(config)
        self._worker, self._grace_s = worker, grace_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._worker.end_within(self._grace_s)


def serve(
    worker: Worker,
    translator: Translator,
    name: str,
    address: Address,
    *,
    grace_s: float,
    version: str,
) -> int:
    """Answer requests until SIGTERM or Ctrl-C; return the exit code.

    Raises:
        UserError: when the address cannot be listened on.
    """
    listener = _listen(address)
    host, port = listener.getsockname()[:2]
    is_local = is_loopback(host)
    if not is_local and address.key is None:
        say(f"warning: whoever reaches {host}:{port} can use this server; give it an --api-key.")
    access = Access(address.key, is_local)
    app = Server(name, worker, translator, access, version).app()
    server = _Uvicorn(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(grace_s) + LEEWAY_S,
        ),
        worker,
        grace_s,
    )
    shows = logging.StreamHandler()
    logging.getLogger("uvicorn.error").addHandler(shows)
    shown = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    say(f"{name} answers at {shown}/ (page) and {shown}/v1; Ctrl-C ends.")
    worker.done.add_done_callback(lambda _: setattr(server, "should_exit", True))
    # uvicorn raises the signals again that it has handled, which would end us before our code
    previous = _ignore_signals()
    try:
        server.run(sockets=[listener])
    finally:
        _restore(previous)
        logging.getLogger("uvicorn.error").removeHandler(shows)
        listener.close()
        worker.stop()
    worker.done.result()  # raises what the engine failed with
    return DONE


def _ignore_signals() -> Mapping[int, object]:
    def nothing(number: int, frame: FrameType | None) -> None:
        """Let uvicorn's second raise of a signal pass."""

    return {number: signal.signal(number, nothing) for number in (signal.SIGINT, signal.SIGTERM)}


def _restore(previous: Mapping[int, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal returned


def _listen(address: Address) -> socket.socket:
    try:
        [family, *_], *_ = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot be listened on: {error.strerror}; give another.",
            key=f"--host {address.host} --port",
            value=address.port,
        ) from None
