"""Options of the commands that let a model write: how tokens are drawn, and when they end."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.generate.sampling import Sampling


@dataclass(frozen=True)
class AnswerOptions:
    """How every answer of a command is written."""

    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.8
    top_k: Annotated[
        int | None, typer.Option(help="Sample only from this many most likely tokens.")
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Sample only from tokens with this total probability.")
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(help="Sample only from tokens with this share of the likeliest one."),
    ] = None
    repeat_penalty: Annotated[
        float, typer.Option(help="Above 1, tokens that are in the text already become less likely.")
    ] = 1.0
    stop: Annotated[
        list[str] | None, typer.Option(help="Text before which to end; repeatable.")
    ] = None
    think_budget: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens after which the reasoning is closed with </think>."),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed that makes sampling repeatable.")] = None

    @property
    def sampling(self) -> "Sampling":
        """How tokens are drawn.

        Raises:
            UserError: when a number is impossible.
        """
        from nemotron.generate.sampling import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            min_p=self.min_p,
            repetition_penalty=self.repeat_penalty,
        )
