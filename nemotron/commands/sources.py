"""Options of the commands that read rows: where these come from, and what is in them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.data.prepare.options import HubOptions

RowSources = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders or patterns: JSON lines or parquet; of text, each line is a row.",
        metavar="SOURCE...",
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column that holds the text.")]
MaxBadRows = Annotated[
    int, typer.Option(min=0, help="Stop if there are more unreadable rows than this.")
]
Tokenizer = Annotated[str, typer.Option(help="The word embedded, a tokenizer.json, or its folder.")]
SpecialTokens = Annotated[
    list[str] | None,
    typer.Option(help="Special token in addition to those of Nemotron 3; repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Number of processes; default: one per core.")
]


@dataclass(frozen=True)
class DataSetOptions:
    """Which part of a data set on the Hub is read, and how."""

    subset: Annotated[str | None, typer.Option(help="Subset of an hf:// data set.")] = None
    split: Annotated[str, typer.Option(help="Split of an hf:// data set.")] = "train"
    revision: Annotated[str | None, typer.Option(help="Revision of an hf:// data set.")] = None
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read an hf:// data set without storing it.")
    ] = False

    def read(self) -> "HubOptions":
        """Return the options as the preparation of data takes them."""
        from nemotron.data.prepare.options import HubOptions

        return HubOptions(
            subset=self.subset,
            split=self.split,
            revision=self.revision,
            streaming=self.streaming,
        )
