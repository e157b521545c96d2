"""Who may ask, and how large a body may be."""

import asyncio
import hmac
import ipaddress
from dataclasses import dataclass

from starlette.requests import Request

from nemotron.serve.errors import ApiError
from nemotron.serve.limits import Limits


def is_loopback(host: str) -> bool:
    """Say whether a name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Access:
    """The key of a server, and whether it may be called by local names alone."""

    key: str | None
    is_local: bool
    """Then other names in a request mean a web page that was made to reach this server."""

    def check(self, request: Request, *, open_to_all: bool = False) -> None:
        """Check name and key of a request.

        Raises:
            ApiError: 403 for a foreign name, 401 for a wrong key.
        """
        name = request.headers.get("host", "")
        if self.is_local and not is_loopback(_without_port(name)):
            raise ApiError(403, f"this server answers to localhost, not to {name[:60]!r}.")
        if self.key is None or open_to_all:
            return
        given = request.headers.get("authorization", "").partition("Bearer ")[2]
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
            )


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 413 when it is too large, 408 when it is too slow, 415 when it is not JSON.
    """
    # what a page of another origin can send without being asked has another type
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "the body must be JSON; send the header Content-Type: application/json."
        )
    try:
        async with asyncio.timeout(limits.body_s):
            return await _read(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_s:g} s.") from None


async def _read(request: Request, most: int) -> bytes:
    announced = request.headers.get("content-length", "")
    parts, size = [], int(announced) if announced.isdecimal() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most:
        raise ApiError(413, f"the body is larger than {most:,} bytes; send a smaller one.")
    return b"".join(parts)


def _without_port(name: str) -> str:
    if name.startswith("["):
        return name.partition("]")[0]
    return name.partition(":")[0]
