"""Options that decide in which formats a model is quantized."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.shared import refuse_without
from nemotron.limits import MOST_ROWS

if TYPE_CHECKING:
    from nemotron.quantize.decide import Wanted

OF_A_SEARCH = ("score", "score_rows", "cost")
"""Options that only a search with `--bits` reads."""


@dataclass(frozen=True)
class FormatOptions:
    """Which formats and scales a model gets, and the text that decides them."""

    preset: Annotated[
        str | None, typer.Option(help="Formats by kind of layer, such as fp8 and super_nvfp4.")
    ] = None
    bits: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=32.0, help="Search formats of so many bits a weight, in place of a preset."
        ),
    ] = None
    like: Annotated[
        Path | None,
        typer.Option(help="Quantized folder whose formats and scales are taken, after QAD."),
    ] = None
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of layers that stay in bfloat16; repeatable."),
    ] = None
    weights: Annotated[
        str | None,
        typer.Option(help="Scales of NVFP4 weights: max, mse or four_over_six; default: preset's."),
    ] = None
    kv_cache: Annotated[
        bool | None,
        typer.Option(help="Write FP8 scales of keys and values; default: as the preset."),
    ] = None
    rows: Annotated[
        int, typer.Option(min=1, max=MOST_ROWS, help="Rows of text to calibrate on.")
    ] = 128
    score: Annotated[
        str, typer.Option(help="Sensitivity for --bits: fisher (one backward) or kl.")
    ] = "fisher"
    score_rows: Annotated[
        int, typer.Option(min=1, max=MOST_ROWS, help="Rows of text for --bits.")
    ] = 32
    cost: Annotated[
        str,
        typer.Option(
            help="What --bits is a mean over: weights, or active, those that a token uses."
        ),
    ] = "weights"
    inputs: Annotated[
        str, typer.Option(help="Reach of the scales of inputs: max, percentile or mse.")
    ] = "max"
    every_expert: Annotated[
        bool,
        typer.Option("--every-expert", help="Calibrate every expert on all tokens, too."),
    ] = False

    def read(self) -> "Wanted":
        """Return what the options ask for.

        Raises:
            UserError: when one is impossible, contradicts another, or has no effect.
        """
        from nemotron.quantize.decide import Wanted

        if self.bits is None:
            defaults = {field.name: field.default for field in fields(self)}
            refuse_without("--bits", {name: getattr(self, name) for name in OF_A_SEARCH}, defaults)
        return Wanted(
            preset=self.preset,
            bits=self.bits,
            like=self.like,
            keep=self.keep or (),
            weights=self.weights,
            cache=self.kv_cache,
            rows=self.rows,
            score=self.score,
            score_rows=self.score_rows,
            cost=self.cost,
            inputs=self.inputs,
            every_expert=self.every_expert,
        )
