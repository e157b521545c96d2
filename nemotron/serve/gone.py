"""Clients that leave before they have their answer."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, which is canceled when the client leaves.

    Raises:
        ClientDisconnect: when it has.
    """
    return await _race(request.receive, work)


class EventStream(Response):
    """Sends server-sent events as they come, and closes their source when the client leaves.

    Then `left` is called; a client that leaves does not raise an error. One that reads nothing
    for `stall_s` seconds has left.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], left: Callable[[], None], stall_s: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._left, self._stall_s = events, left, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _race(receive, self._send(send))
        except ClientDisconnect:
            self._left()
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        headers = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(headers)
        async for event in self._events:
            try:
                async with asyncio.timeout(self._stall_s):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except TimeoutError:
                raise ClientDisconnect from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _race(receive: Receive, work: Awaitable[T]) -> T:
    running = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_leave(receive))
    try:
        await asyncio.wait({running, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientDisconnect
    finally:
        for task in (running, leaving):
            task.cancel()
        await asyncio.gather(running, leaving, return_exceptions=True)


async def _wait_for_leave(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
