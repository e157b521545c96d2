"""Options of the commands that let a model write: drafts, and formats of what is remembered."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.generate.speculate import Speculation
    from nemotron.model.cache_formats import CacheFormats


@dataclass(frozen=True)
class DecodingOptions:
    """How an engine decodes."""

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
    def speculation(self) -> "Speculation | None":
        """How tokens are guessed.

        Raises:
            UserError: when an option is impossible, or has no effect.
        """
        from nemotron.errors import UserError
        from nemotron.generate.speculate import Speculation

        given = {"length": self.draft_tokens, "method": self.draft_method}
        given = {key: value for key, value in given.items() if value is not None}
        if self.speculate is not None:
            return Speculation(source=self.speculate, **given)  # type: ignore[arg-type]  # checks
        if given:
            raise UserError(
                "--draft-tokens and --draft-method need --speculate; give it or leave them out."
            )
        return None

    @property
    def formats(self) -> "CacheFormats":
        """How the cache holds what it remembers.

        Raises:
            UserError: when a format is not known.
        """
        from nemotron.model.cache_formats import CacheFormats

        return CacheFormats(self.state_dtype, self.kv_dtype)  # type: ignore[arg-type]  # it checks
