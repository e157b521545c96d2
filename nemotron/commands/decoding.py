"""Options of the commands that generate: speculative decoding, and the formats of the cache."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.generate.speculate import Speculation
    from nemotron.model.cache_formats import CacheFormats


@dataclass(frozen=True)
class DecodingOptions:
    """How a command computes its answers."""

    speculate: Annotated[
        str | None,
        typer.Option(
            help="Guess tokens and test several in one pass: mtp guesses with the model's "
            "multi-token-prediction block, lookup from the text."
        ),
    ] = None
    draft_tokens: Annotated[
        int | None, typer.Option(help="Tokens to guess at most (--speculate). Default: 3.")
    ] = None
    draft_method: Annotated[
        str | None,
        typer.Option(
            help="rejection accepts most guesses; match gives the text that the seed gives without "
            "guesses (--speculate mtp). Default: rejection."
        ),
    ] = None
    state_dtype: Annotated[
        str,
        typer.Option(help="Format of Mamba-2 states: fp32, fp16, or fp16_sr (rounded by chance)."),
    ] = "fp32"
    kv_dtype: Annotated[
        str, typer.Option(help="Format of keys and values: model (its own), bf16 or fp8.")
    ] = "model"

    @property
    def formats(self) -> "CacheFormats":
        """The formats of the cache.

        Raises:
            UserError: when one is not known.
        """
        from nemotron.model.cache_formats import CacheFormats

        return CacheFormats(self.state_dtype, self.kv_dtype)  # type: ignore[arg-type]  # it checks

    @property
    def speculation(self) -> "Speculation | None":
        """The settings of speculative decoding; None without it.

        Raises:
            UserError: when one is impossible, or has no effect.
        """
        from nemotron.errors import UserError
        from nemotron.generate.speculate import Speculation

        given = {"length": self.draft_tokens, "method": self.draft_method}
        given = {key: value for key, value in given.items() if value is not None}
        if self.speculate is None:
            if given:
                raise UserError(
                    "need --speculate; give it or leave them out.",
                    key="--draft-tokens and --draft-method",
                )
            return None
        # it checks the words
        return Speculation(source=self.speculate, **given)  # type: ignore[arg-type]
