"""The options that all commands that generate have: speculative decoding, and the cache."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.generate.speculate import Speculation
    from nemotron.model.cache_formats import CacheFormats

Speculate = Annotated[
    str | None,
    typer.Option(
        help="Guess tokens and test several in one pass: mtp guesses with the model's "
        "multi-token-prediction block, lookup from the text."
    ),
]
DraftTokens = Annotated[
    int | None, typer.Option(help="Tokens to guess at most (--speculate). Default: 3.")
]
DraftMethod = Annotated[
    str | None,
    typer.Option(
        help="rejection accepts most guesses; match gives the text that the seed gives without "
        "guesses (--speculate mtp). Default: rejection."
    ),
]


StateDtype = Annotated[
    str, typer.Option(help="Format of Mamba-2 states: fp32, fp16, or fp16_sr (rounded by chance).")
]
KVDtype = Annotated[
    str, typer.Option(help="Format of keys and values: model (its own), bf16 or fp8.")
]


def find_formats(state_dtype: str, kv_dtype: str) -> "CacheFormats":
    """Return the formats of the cache.

    Raises:
        UserError: when one is not known.
    """
    from nemotron.model.cache_formats import CacheFormats

    return CacheFormats(state_dtype, kv_dtype)  # type: ignore[arg-type]  # it checks the words


def find_speculation(
    source: str | None, length: int | None, method: str | None
) -> "Speculation | None":
    """Return what the options say about speculative decoding.

    Raises:
        UserError: when one is impossible, or has no effect.
    """
    from nemotron.errors import UserError
    from nemotron.generate.speculate import Speculation

    given = {"length": length, "method": method}
    given = {key: value for key, value in given.items() if value is not None}
    if source is None:
        if given:
            raise UserError(
                "--draft-tokens and --draft-method need --speculate; give it or leave them out."
            )
        return None
    return Speculation(source=source, **given)  # type: ignore[arg-type]  # it checks the words
