"""Taking secrets out of what is written to files and sent to trackers."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_WORDS = (
    r"(?:token|key|secret|pass|passphrase|pat|authorization|creds?|credentials?"
    r"|[a-z]*(?:apikey|passw)[a-z]*)"
)
_SECRET_NAME = re.compile(rf"(?:^|[^a-z]){_WORDS}(?:$|[^a-z])", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")

SHORTEST_SECRET = 8
"""Characters that the value of an environment variable needs before it is hunted in texts."""


def names_a_secret(name: str) -> bool:
    """Say whether a key's name has one of the words on its own: `api_key`, but not `num_tokens`."""
    return _SECRET_NAME.search(name) is not None


def redact_text(text: str) -> str:
    """Hide user names and passwords in URLs and the values of secret environment variables."""
    for name, value in os.environ.items():
        if names_a_secret(name) and len(value) >= SHORTEST_SECRET:
            text = text.replace(value, HIDDEN)
    return _USER_INFO.sub(f"{HIDDEN}@", text)


def redact_arguments(arguments: list[str]) -> list[str]:
    """Hide secrets in a command line, also `--api-key VALUE` and `password=VALUE`."""
    hidden, previous_names = [], False
    for argument in arguments:
        name, sign, value = argument.partition("=")
        if previous_names:
            argument = HIDDEN
        elif sign and value and names_a_secret(name):
            argument = f"{name}={HIDDEN}"
        previous_names = not sign and argument.startswith("-") and names_a_secret(argument)
        hidden.append(redact_text(argument))
    return hidden


def redact(value: Any, name: str = "") -> Any:  # Any: nested JSON
    """Hide secrets in nested mappings and lists; only texts are secrets, never numbers."""
    if isinstance(value, Mapping):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if names_a_secret(name) else redact_text(value)
    return value
