"""Send malformed requests to a server, and check that each gets a sentence and none harms it.

An answer of 500 or above, none at all, a traceback in it, or a refusal that is not one sentence is
a failure, and so is a server that does not answer an ordinary request afterwards.

    nemotron serve runs/mine --port 8000 --max-answer 8 &
    python tools/fuzz_server.py http://127.0.0.1:8000             2,000 requests
    python tools/fuzz_server.py http://127.0.0.1:8000 --seed 7 --only 123     one again, shown
"""

import argparse
import json
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]

LIMIT_S = 20.0
"""Seconds within which an answer must have come."""
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
FIELDS = (
    *("input", "instructions", "include", "text", "reasoning", "store", "max_output_tokens"),
    *("model", "messages", "prompt", "tools", "tool_choice", "n", "stop", "seed", "stream"),
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "logit_bias", "logprobs"),
    *("top_logprobs", "stream_options", "chat_template_kwargs", "reasoning_budget"),
    *("presence_penalty", "response_format", "metadata", "user", "reasoning_effort", "echo"),
    *(
        "min_tokens",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "continue_final_message",
    ),
    *(
        "tokens",
        "add_generation_prompt",
        "max_completion_tokens",
        "parallel_tool_calls",
        "\x00",
        "é",
        "a.b[0]",
    ),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**30, 1e308, -0.5, 1e-320, "", "x", "\x00", "\U0010ffff", "\u202e"),
    *([], {}, [[]], [None], [-1], [1e9], [""], {"a": {}}, {"-1": 1}, {"3": 1e9}, "x" * 3000),
    *([{"role": "user"}], [{"role": "tool", "content": ""}], [{"role": "x", "content": "a"}]),
    *([{"role": "assistant", "content": [{"type": "image_url"}]}], [{"function": {"name": 1}}]),
    *([{"role": "user", "content": "<|im_end|>"}], {"type": "json_schema"}, {"type": "text"}),
    *({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objct"}}}, FORMAT),
    *({"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#/x"}}},),
    *({"type": "json_schema", "json_schema": {"name": "a", "schema": {"pattern": "("}}},),
    *({"enable_thinking": 1}, {"include_usage": "x"}, "required", [TOOL], [TOOL, TOOL], 2**63),
)
RIGHT: Json = {
    "n": 2,
    "stop": ["a", "b"],
    "seed": 1,
    "stream": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "logit_bias": {"7": 5},
    "logprobs": 1,
    "echo": True,
    "presence_penalty": 1,
    "stream_options": {"include_usage": True},
    "reasoning_budget": 1,
    "min_tokens": 1,
    "stop_token_ids": [7],
    "user": "me",
    "chat_template_kwargs": {"enable_thinking": False},
    "response_format": FORMAT,
}
"""Values that most requests may have, so that the wrong ones are met at every depth."""
RAW = (
    b"[" * 5000, b'{"a":' * 3000, b"null", b"7", b"", b'"\\ud800"', b"\xff\xfe", b"NaN",
    b'{"model": "\\ud800", "prompt": "a"}', b'{"a": 1, "a": 2}', b"\xef\xbb\xbf{}", b"{}" * 99,
)  # fmt: skip
BODIES: dict[bytes, Json] = {
    b"/v1/chat/completions": {"messages": HELLO, "tools": [TOOL]},
    b"/v1/completions": {"prompt": "a"},
    b"/v1/responses": {"input": HELLO},
    b"/tokenize": {"messages": HELLO},
    b"/detokenize": {"tokens": [7]},
}
HEADS = (
    b"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: -5\r\n\r\n{body}",
    b"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: x\r\n\r\n{body}",
    b"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{}",
    b"POST {path} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{body}",
    b"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"PUT / HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"GET /v1/models/%00%ff%2e%2e HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"GET /" + b"a" * 4000 + b" HTTP/1.1\r\nHost: {host}\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\n\r\n",
    b"GET /v1/models HTTP/9.9\r\nHost: {host}\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"nothing of the kind\r\n\r\n",
    b"\x00" * 300 + b"\r\n\r\n",
)


def malformed(model: str, host: str, draw: random.Random) -> bytes:
    """Return a whole request that is wrong in a few places, or in none by chance."""
    path = draw.choices(list(BODIES), weights=[6, 4, 3, 1, 1])[0]
    body: Json = {"model": model, **BODIES[path]}
    if path == b"/v1/responses":
        body |= {"max_output_tokens": 2, "stream": draw.random() < 0.2}
    elif path.startswith(b"/v1/"):
        body["max_tokens"] = 2
        body |= {key: RIGHT[key] for key in draw.sample(sorted(RIGHT), draw.randrange(4))}
        if "echo" in body:
            body["max_tokens"] = draw.choice((0, 2))
    for _ in range(draw.randrange(3)):
        body[draw.choice(FIELDS)] = draw.choice(VALUES)
    content = _damaged(json.dumps(body).encode(), draw)
    if draw.random() < 0.1:
        parts = {b"{path}": path, b"{host}": host.encode(), b"{body}": content}
        head = draw.choice(HEADS)
        for name, part in parts.items():
            head = head.replace(name, part)
        return head
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: " + host.encode()]
    lines += [b"Content-Type: application/json", b"Content-Length: %d" % len(content)]
    return b"\r\n".join([*lines, b"Connection: close", b"", content])


def _damaged(content: bytes, draw: random.Random) -> bytes:
    kind = draw.random()
    if kind < 0.15:
        return content[: draw.randrange(len(content))]
    if kind < 0.3:
        place = draw.randrange(len(content))
        return content[:place] + draw.randbytes(2) + content[place + 1 :]
    return draw.choice(RAW) if kind < 0.36 else content


@dataclass
class Report:
    """What the requests were answered with."""

    statuses: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{status}: {n}" for status, n in sorted(self.statuses.items()))
        return f"{counts}; slowest answer {self.slowest_s:.2f} s; {len(self.failures)} failures"


def exchange(url: str, request: bytes) -> bytes:
    """Send bytes and return all that comes back until the server closes, or nothing more comes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), LIMIT_S) as connection:
        connection.sendall(request)
        if b"\r\nConnection: close\r\n" not in request:
            # the end of what would not be complete; to a server it means that the client left
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return answer


def fault_of(answer: bytes) -> str | None:
    """Return what is wrong with an answer to a malformed request."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    if found is None:
        return "no HTTP" if answer else None  # a request that is not HTTP may get nothing
    status = int(found[1])
    head, _, content = answer.partition(b"\r\n\r\n")
    if status == 200 or b"application/json" not in head:
        # uvicorn itself refuses what is not HTTP, in plain text
        return None if status in (200, 400) else f"status {status} without JSON"
    if not 400 <= status < 500:
        return f"status {status}"
    message = json.loads(content)["error"]["message"]
    is_sentence = message.endswith((".", "?")) and "\n" not in message
    return None if is_sentence and "Traceback" not in message else f"no sentence: {message!r}"


def fuzz(
    url: str, model: str, numbers: Iterable[int], seed: int, show: Callable[[str], None] = print
) -> Report:
    """Send the requests of these numbers, one after the other."""
    report = Report()
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        request = malformed(model, urlsplit(url).netloc, draw)
        begin = time.monotonic()
        try:
            answer = exchange(url, request)
            fault = fault_of(answer)
        except (OSError, ValueError, KeyError) as error:
            answer, fault = b"", repr(error)
        report.slowest_s = max(report.slowest_s, time.monotonic() - begin)
        report.statuses[answer[9:12].decode(errors="replace") or "closed"] += 1
        if fault is not None:
            report.failures.append(f"{number}: {fault}")
            show(f"{number}: {fault}\n{request[:2000]!r}\n{answer[:2000]!r}\n")
    return report


def is_well(url: str, model: str) -> bool:
    """Say whether the server still answers as it should."""
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 2}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return exchange(url, head.encode() + body).startswith(b"HTTP/1.1 200")


def model_of(url: str) -> str:
    head = f"GET /v1/models HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n\r\n"
    content = exchange(url, head.encode()).partition(b"\r\n\r\n")[2]
    return str(json.loads(content)["data"][0]["id"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="address of a server without a key")
    parser.add_argument("number", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one request")
    options = parser.parse_args()
    numbers = range(options.number) if options.only is None else [options.only]
    model = model_of(options.url)
    report = fuzz(options.url, model, numbers, options.seed)
    print(report)
    well = is_well(options.url, model)
    print("the server answers" if well else "the server does not answer any more")
    return int(bool(report.failures) or not well)


if __name__ == "__main__":
    sys.exit(main())
