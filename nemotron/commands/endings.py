"""Options of `generate`: when an answer ends, and what of its end is shown."""

from dataclasses import dataclass
from typing import Annotated

import typer

from nemotron.limits import MOST_TOKENS


@dataclass(frozen=True)
class EndingOptions:
    """How every answer of a command ends."""

    min_new_tokens: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_TOKENS, help="Tokens to add before the one that may end the text."
        ),
    ] = 0
    stop_token_id: Annotated[
        list[int] | None, typer.Option(min=0, help="Token that ends the text; repeatable.")
    ] = None
    include_stop: Annotated[
        bool,
        typer.Option("--include-stop", help="Show the text of --stop or --stop-token-id, too."),
    ] = False
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after the model's end of text.")
    ] = False
    special_tokens: Annotated[
        bool,
        typer.Option("--special-tokens", help="Show the names of special tokens in the answer."),
    ] = False
