"""Options of `nemotron evaluate` for the tasks of lm-evaluation-harness."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nemotron.evaluate.harness_command import Harness

_PANEL = "Tasks of lm-evaluation-harness (--lm-eval)"


@dataclass(frozen=True)
class HarnessOptions:
    """What is evaluated on tasks of lm-evaluation-harness, and how; nothing without tasks."""

    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            "--lm-eval",
            metavar="TASK",
            help="Name of a task or group, or its YAML file; repeatable, or with commas.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of more tasks.", rich_help_panel=_PANEL)
    ] = None
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, help="Examples in a prompt; default: as the task says.", rich_help_panel=_PANEL
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions of a task; default: all.", rich_help_panel=_PANEL),
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask in the chat format.", rich_help_panel=_PANEL)
    ] = False
    thinking: Annotated[
        bool, typer.Option(help="Ask for reasoning (--chat).", rich_help_panel=_PANEL)
    ] = True
    strip_reasoning: Annotated[
        bool,
        typer.Option(
            "--strip-reasoning",
            help="Score what follows </think> alone; stop strings count from there.",
            rich_help_panel=_PANEL,
        ),
    ] = False
    rows: Annotated[int, typer.Option(min=1, help="Texts at a time.", rich_help_panel=_PANEL)] = 16
    samples: Annotated[
        Path | None,
        typer.Option(
            help="File of JSON lines to write: each question with its answers and scores.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def wanted(self, recipe: Path | None, overrides: list[str] | None) -> "Harness | None":
        """Return what the options say; None without tasks.

        Raises:
            UserError: when an option has no effect.
        """
        from nemotron.errors import UserError
        from nemotron.evaluate.harness_command import Harness

        if self.lm_eval is None:
            for option in fields(self):
                if getattr(self, option.name) != option.default:
                    name = "no-thinking" if option.name == "thinking" else option.name
                    rule = "goes with --lm-eval TASK; give it, too."
                    raise UserError(rule, key="--" + name.replace("_", "-"))
            return None
        if recipe is not None or overrides:
            raise UserError(
                "tasks of --lm-eval bring their own text; leave --recipe and KEY=VALUE out."
            )
        if not self.thinking and not self.chat:
            raise UserError("goes with --chat; give it, too.", key="--no-thinking")
        return Harness(
            [name for words in self.lm_eval for name in words.split(",") if name],
            include_path=self.include_path,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            chat=self.chat,
            thinking=self.thinking,
            strip_reasoning=self.strip_reasoning,
            rows=self.rows,
            samples=self.samples,
        )
