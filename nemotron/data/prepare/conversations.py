"""Conversations to token ids, each with whether it is learned."""

import json
import random
from collections.abc import Mapping
from typing import Any

from nemotron.data.chat.forms import openai_messages, openai_tools
from nemotron.data.chat.reasoning import cut_reasoning
from nemotron.data.chat.render import Rendered, training_sequences
from nemotron.data.prepare.encode import Ids
from nemotron.data.prepare.options import ChatOptions
from nemotron.data.prepare.read import no_column
from nemotron.data.tokenizer import Tokenizer

HALF_CHARACTER = "a lone surrogate, which is not a character"


def encode_conversation(
    row: Mapping[str, Any],  # Any: what a row holds
    tokenizer: Tokenizer,
    options: ChatOptions,
) -> list[Ids]:
    """Return the training sequences of a row with messages and perhaps tools.

    Raises:
        ValueError: when the row is not a conversation, in one sentence.
        RecursionError: when it is nested too deep.
    """
    messages, tools = row.get(options.messages_column), row.get(options.tools_column)
    if messages is None:
        raise ValueError(no_column(options.messages_column, row))
    messages = openai_messages(parsed(messages))
    tools = openai_tools(parsed(tools)) or None
    rng, off = _random_of(messages), options.reasoning_off_rate
    drawn, cut = rng.random(), off + options.reasoning_budget_rate
    sequences = training_sequences(
        messages,
        tools,
        enable_thinking=options.enable_thinking and drawn >= off,
        truncate_history_thinking=options.truncate_history_thinking,
    )
    if options.enable_thinking and off <= drawn < cut:
        sequences = [cut_reasoning(sequence, rng) for sequence in sequences]
    if not all(is_unicode(sequence.text) for sequence in sequences):
        raise ValueError(f"has a text with {HALF_CHARACTER}")
    return [encode_rendered(sequence, tokenizer) for sequence in sequences]


def _random_of(messages: Any) -> random.Random:  # Any: what a row holds
    """Return random numbers that depend on the conversation alone, in every process."""
    return random.Random(json.dumps(messages, sort_keys=True, default=str))


def is_unicode(text: str) -> bool:
    """Say whether a text has only whole characters; JSON can escape one half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_nulls(value: Any) -> Any:  # Any: nested values of a table
    """Leave out members of objects that are null: a table fills absent ones in with it."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def parsed(value: Any) -> Any:  # Any: nested JSON
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
