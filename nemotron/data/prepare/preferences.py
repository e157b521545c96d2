"""Pairs of answers to token ids: one document, the chosen conversation and then the rejected."""

from collections.abc import Callable, Mapping
from typing import Any

from nemotron.data.chat.forms import openai_tools
from nemotron.data.chat.preference import preference_of
from nemotron.data.config import PreferenceOptions
from nemotron.data.indexed import LEARNED, REJECTED
from nemotron.data.prepare.conversations import (
    HALF_CHARACTER,
    encode_rendered,
    is_unicode,
    parsed,
)
from nemotron.data.prepare.encode import Ids
from nemotron.data.prepare.read import no_column
from nemotron.data.tokenizer import Tokenizer

Count = Callable[[str], None]
"""Counts something about a row by the name of its field in `Counts`."""


def encode_preference(
    row: Mapping[str, Any],  # Any: what a row holds
    tokenizer: Tokenizer,
    options: PreferenceOptions,
    count: Count,
) -> list[Ids]:
    """Return the document of a row; none, and it is counted, if both answers are the same.

    Raises:
        ValueError: when the row is not a pair of answers, in one sentence.
        RecursionError: when it is nested too deep.
    """
    for column in (options.chosen_column, options.rejected_column):
        if row.get(column) is None:
            raise ValueError(no_column(column, row))
    pair = preference_of(
        row.get(options.prompt_column), row[options.chosen_column], row[options.rejected_column]
    )
    rendered = pair.render(
        openai_tools(parsed(row.get(options.tools_column))) or None,
        enable_thinking=options.enable_thinking,
        truncate_history_thinking=options.truncate_history_thinking,
    )
    if not all(is_unicode(one.text) for one in rendered):
        raise ValueError(f"has a text with {HALF_CHARACTER}")
    chosen, rejected = (encode_rendered(one, tokenizer) for one in rendered)
    assert chosen.learned is not None
    assert rejected.learned is not None
    if chosen.ids == rejected.ids:
        count("unsupervised")
        return []
    for name, answer in (("chosen", chosen.learned), ("rejected", rejected.learned)):
        if LEARNED not in answer:
            raise ValueError(f"{name} has no token to learn; give an answer that is not empty.")
    return [
        Ids(
            [*chosen.ids, *rejected.ids],
            chosen.num_bytes + rejected.num_bytes,
            is_last=True,
            learned=[*chosen.learned, *(role + REJECTED for role in rejected.learned)],
            # all pairs of one prompt are held out, or none
            family=chosen.ids[: chosen.learned.index(LEARNED)],
        )
    ]
