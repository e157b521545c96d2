"""Two hundred streams at a time, with readers that are slow, stop reading or leave."""

import asyncio
import dataclasses
import gc
import json
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from nemotron.serve.worker import Stream
from tests.support.serving import LIMITS, Running, Start

httpx = pytest.importorskip("httpx")

NUM_STREAMS = 200
KINDS = ("reads", "slow", "leaves at once", "leaves later", "stops reading")


def body_of(number: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hello {number % 7}"}]
    body = {"model": "tiny", "messages": messages, "stream": True, "max_tokens": 12}
    return body | {"seed": number % 3} | changes


@asynccontextmanager
async def opened(
    url: str, body: dict[str, Any]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Send a request by hand, through a socket that holds little of what is not read."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    host, port = url.removeprefix("http://").split(":")
    await asyncio.get_running_loop().sock_connect(own, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    content = json.dumps(body).encode()
    head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    writer.write(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
    try:
        yield reader, writer
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def text_of(reader: asyncio.StreamReader, pause_s: float = 0.0) -> str:
    """Read a stream to its end, and return its texts."""
    held = b""
    while b"data: [DONE]\n\n" not in held:
        part = await reader.read(2000)
        assert part, "the stream was cut"
        held += part
        await asyncio.sleep(pause_s)
    # the lines of a chunked body have their length between them
    lines = [line for line in held.split(b"\n") if line.startswith(b"data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
    return "".join(d.get("reasoning_content", "") + d.get("content", "") for d in deltas)


async def visit(url: str, number: int, expected: dict[tuple[int, int], str]) -> None:
    """Be a client of one of the kinds."""
    kind = KINDS[number % len(KINDS)] if number >= 21 else "reads"
    long = {"max_tokens": 400, "logprobs": True, "top_logprobs": 20}
    body = body_of(number, **(long if kind == "stops reading" else {}))
    async with opened(url, body) as (reader, _):
        if kind == "stops reading":
            assert b"200 OK" in await reader.read(100)
            await asyncio.sleep(4 * LIMITS.stall_s)
        elif kind == "leaves later":
            await reader.read(500)
        elif kind in ("reads", "slow"):
            text = await text_of(reader, 0.02 if kind == "slow" else 0.0)
            assert text == expected.setdefault((number % 7, number % 3), text)
            assert text


async def round_of(url: str, num_streams: int = NUM_STREAMS) -> None:
    expected: dict[tuple[int, int], str] = {}
    async with asyncio.timeout(120):
        await asyncio.gather(*(visit(url, number, expected) for number in range(21)))
        await asyncio.gather(*(visit(url, number, expected) for number in range(num_streams)))


def left_over(running: Running) -> dict[str, int]:
    """Count what clients could leave behind."""
    gc.collect()
    return {
        "files": len(os.listdir("/proc/self/fd")),
        # `isinstance` would ask a weak proxy, which other tests may leave, for what is gone
        "streams": sum(type(item) is Stream for item in gc.get_objects()),
        "numbers": len(running.worker._numbers),
    }


@pytest.mark.slow
def test_two_hundred_streams_leave_nothing_and_harm_nobody(
    start: Start, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "uvicorn.error")
    running = start(limits=dataclasses.replace(LIMITS, open_answers=NUM_STREAMS))
    assert httpx.get(running.url + "/health").status_code == 200
    before = left_over(running)
    asyncio.run(round_of(running.url))
    running.wait_until_empty()
    deadline = time.monotonic() + 10  # until the sockets are closed on both sides
    while (after := left_over(running)) != before:
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.05)
    metrics = httpx.get(running.url + "/metrics").text
    assert "nemotron_open_answers 0" in metrics
    canceled = next(line for line in metrics.splitlines() if line.startswith("nemotron_canceled"))
    assert int(canceled.split()[1]) > NUM_STREAMS / 5
    # clients that leave are no errors of the server
    assert not [record for record in caplog.records if record.exc_info], caplog.text
