"""Random damage to a file: to its bytes, its JSON, or the header before its tensors."""

import functools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
)
TEXTS = (
    "",
    " ",
    "a" * 300,
    "../../etc/passwd",
    "/dev/zero",
    "nul\0inside",
    "\ud800",
    "\x1b[2J",
    "${a.b}",
    "${oc.env:HOME}",
    "null",
    "1e400",
    "café\u202e",
    "{{ x }}",
)
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": {}}, 0.5, -0.0, 1e308)
WORDS = (
    b"null", b"-1", b"1e400", b"NaN", b"Infinity", b"18446744073709551616", b"[" * 500, b"{}",
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\n", b"\r", b'"', b"&a [*a]", b"<<: *x",
    b"!!python/object:os.system", b"${", b"extends: ", b"\x80\x04", b"9" * 400,
)  # fmt: skip


def of_bytes(content: bytes, draw: random.Random) -> bytes:
    """Change, cut, repeat or insert bytes in one to four places."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((1, 1, 2, 8, 64, 1024)))
        piece = draw.choice(
            (
                b"",
                content[start:end] * 2,
                draw.choice(WORDS),
                draw.randbytes(end - start),
                bytes(byte ^ (1 << draw.randrange(8)) for byte in content[start:end][:1]),
            )
        )
        content = content[:start] + piece + content[end:]
        if not draw.randrange(12):
            content = content[:start]
    return content


def of_integers(content: bytes, draw: random.Random) -> bytes:
    """Change bytes, or write an extreme number over a little-endian one of 1, 4 or 8 bytes."""
    if draw.random() < 0.3 or len(content) < 16:
        return of_bytes(content, draw)
    width = draw.choice((1, 4, 8))
    start = draw.randrange((len(content) - width) // width + 1) * width
    if draw.random() < 0.4:
        start = min(start, draw.randrange(40))  # the header is what sizes are taken from
    value = draw.choice(NUMBERS) & ((1 << 8 * width) - 1)
    return content[:start] + value.to_bytes(width, "little") + content[start + width :]


def of_json(content: bytes, draw: random.Random) -> bytes:
    """Change a value or a key anywhere in the JSON, or the bytes."""
    if draw.random() < 0.25:
        return of_bytes(content, draw)
    value = _parsed(content)
    for _ in range(draw.choice((1, 1, 2))):
        value = _changed(value, draw)
    text = json.dumps(value, indent=draw.choice((None, 2)))
    if not draw.randrange(20):  # deeper than a reader that calls itself can go
        text = text.replace(draw.choice((": ", "1", '"')), ": " + "[" * 3000 + "]" * 3000 + ", ", 1)
    return text.encode()


@functools.lru_cache(16)
def _parsed(content: bytes) -> Any:  # Any: nested JSON, which nobody changes
    return json.loads(content)


def of_lines(content: bytes, draw: random.Random) -> bytes:
    """Change one line of JSON lines, or the bytes."""
    lines = content.splitlines(keepends=True)
    number = draw.randrange(len(lines))
    lines[number] = of_json(lines[number], draw).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def of_header(content: bytes, draw: random.Random) -> bytes:
    """Change the JSON header of a safetensors file, its length, or the bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if draw.random() < 0.15:
        return of_integers(content[: 8 + length], draw) + data
    changed = of_json(header, draw)
    length = draw.choice((len(changed),) * 6 + NUMBERS) & (2**64 - 1)
    return struct.pack("<Q", length) + changed + data


def of_tensors(content: bytes, draw: random.Random) -> bytes:
    """Change numbers behind the JSON header of a safetensors file, whose length stays."""
    (length,) = struct.unpack("<Q", content[:8])
    data = bytearray(content[8 + length :])
    for _ in range(draw.choice((1, 4, 64))):
        width = draw.choice((1, 2, 4))
        start = draw.randrange(len(data) // width) * width
        value = draw.choice((0, -1, 0x7F, 0x7F80, 0xFF80, 0x7FC00000, 0x7F800000, *NUMBERS))
        data[start : start + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return content[: 8 + length] + bytes(data)


def _changed(value: Any, draw: random.Random) -> Any:
    """Return JSON in which one value, chosen at random on the way down, is another."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        rest = dict(value)
        what = draw.randrange(10)
        if what == 0:
            del rest[key]
        elif what == 1:
            rest[draw.choice(TEXTS)] = rest.pop(key)
        elif what == 2:
            rest[key] = draw.choice(list(value.values()))
        else:
            rest[key] = _changed(value[key], draw)
        return rest
    if isinstance(value, list) and value and draw.random() < 0.85:
        place = draw.randrange(len(value))
        what = draw.randrange(8)
        if what == 0:
            return value[:place] + value[place + 1 :]
        if what == 1:
            return [*value[:place], value[place], *value[place:]]
        return [*value[:place], _changed(value[place], draw), *value[place + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.5:
        return of_bytes(value.encode(errors="replace"), draw).decode(errors="replace")
    if isinstance(value, int) and draw.random() < 0.3:
        return value + draw.choice((-1, 1)) * draw.choice((1, 1000, 10**7))
    if not draw.randrange(30):
        return 10**400
    return draw.choice((*NUMBERS, *TEXTS, *OTHERS))
