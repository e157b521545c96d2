"""Conversations to token ids, each with whether it is learned."""

import json
from collections.abc import Mapping
from typing import Any

from nemotron.data.chat.render import Rendered, training_sequences
from nemotron.data.prepare.encode import Ids
from nemotron.data.prepare.options import ChatOptions
from nemotron.data.tokenizer import Tokenizer


def encode_conversation(
    row: Mapping[str, Any],  # Any: what a row holds
    tokenizer: Tokenizer,
    options: ChatOptions,
) -> list[Ids]:
    """Return the training sequences of a row with messages and perhaps tools.

    Raises:
        ValueError: when the row is no conversation, in one sentence.
    """
    messages, tools = row.get(options.messages_column), row.get(options.tools_column)
    if messages is None:
        names = ", ".join(row) or "none"
        raise ValueError(f"has no column {options.messages_column} (its columns: {names})")
    messages, tools = _parsed(messages), _parsed(tools) or None
    sequences = training_sequences(
        messages,
        tools,
        enable_thinking=options.enable_thinking,
        truncate_history_thinking=options.truncate_history_thinking,
    )
    return [encode_rendered(sequence, tokenizer) for sequence in sequences]


def _parsed(value: Any) -> Any:  # Any: nested JSON
    """Return what a column holds; data sets often keep nested values as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def encode_rendered(rendered: Rendered, tokenizer: Tokenizer) -> Ids:
    """Encode what the assistant produced apart from what it was given, as generation does."""
    ids: list[int] = []
    learned: list[int] = []
    at = 0
    for start, stop in (*rendered.supervised, (len(rendered.text), len(rendered.text))):
        for part, value in ((rendered.text[at:start], 0), (rendered.text[start:stop], 1)):
            new = tokenizer.encode(part, specials=True) if part else []
            ids += new
            learned += [value] * len(new)
        at = stop
    return Ids(ids, len(rendered.text.encode()), is_last=True, learned=learned)
