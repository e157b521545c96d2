"""Options of an evaluation on suites."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.shared import refuse_without
from nemotron.limits import MOST_SAMPLES, MOST_TASKS, MOST_TOKENS

if TYPE_CHECKING:
    from nemotron.evaluate.suites import Plan


RULER = "ruler"
LONG_TEXTS = ("lengths", "depths")


@dataclass(frozen=True)
class SuiteOptions:
    """What is asked, and how it is answered."""

    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="arithmetic, instructions, knowledge, mathematics, tools, code, gym, "
            "long_context, offline (all of these), ruler, perplexity, or an environment with its "
            "level behind an @; repeatable."
        ),
    ] = None
    against: Annotated[
        Path | None, typer.Option(help="Model to compare with, on the same answers and text.")
    ] = None
    tasks: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TASKS, help="Rows of each task; default: 64, of ruler 8."),
    ] = None
    samples: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Answers to each row.")] = 1
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0
    seed: Annotated[int, typer.Option(min=0, help="Seed of rows and answers.")] = 0
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer.")] = (
        256
    )
    prompt: Annotated[
        str,
        typer.Option(help="chat, text, or auto: chat if the model brings a chat template."),
    ] = "auto"
    thinking: Annotated[bool, typer.Option(help="Ask for reasoning (chat).")] = True
    budget: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Tokens after which reasoning is closed; repeatable."),
    ] = None
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends an answer; repeatable.")
    ] = None
    lengths: Annotated[str, typer.Option(help="Tokens of the long texts (ruler).")] = "512,2048"
    depths: Annotated[
        str, typer.Option(help="Shares of the text before what is sought (ruler).")
    ] = "0,0.25,0.5,0.75,1"
    batch: Annotated[int, typer.Option(min=1, help="Answers written at a time.")] = 32
    row_by_row: Annotated[
        bool,
        typer.Option("--row-by-row", help="Same bits for every --batch; slower."),
    ] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the evaluation in the folder OUT.")
    ] = False

    @property
    def is_asked(self) -> bool:
        """Whether more is wanted than the loss on held-out text."""
        return bool(self.suite) or self.against is not None

    def refuse_idle(self) -> None:
        """Refuse options of suites where none reads them.

        Raises:
            UserError: when one is given.
        """
        values, defaults = vars(self), {field.name: field.default for field in fields(self)}
        of_text = ("suite", "against", "resume", *LONG_TEXTS)
        if not self.suite:
            own = {name: value for name, value in values.items() if name not in of_text}
            refuse_without("--suite", own, defaults)
        if RULER not in (self.suite or ()):
            own = {name: values[name] for name in LONG_TEXTS}
            refuse_without(f"--suite {RULER}", own, defaults)

    def plan(self) -> "Plan":
        """Return the evaluation.

        Raises:
            UserError: when an option is impossible.
        """
        from nemotron.errors import UserError
        from nemotron.evaluate.model import Asking
        from nemotron.evaluate.suites import RULER_ROWS, Plan
        from nemotron.posttrain.suites.suites import SuiteSettings

        if self.prompt not in ("auto", "chat", "text"):
            rule = "is unknown; give auto, chat or text."
            raise UserError(rule, key="--prompt", value=self.prompt)
        return Plan(
            suites=tuple(self.suite or ()),
            settings=SuiteSettings(self.tasks or 64, self.samples, self.temperature, self.seed),
            asking=Asking(self.prompt, self.thinking, tuple(self.stop or ())),
            max_new_tokens=self.max_new_tokens,
            slots=self.batch,
            row_by_row=self.row_by_row,
            budgets=tuple(self.budget or ()),
            lengths=tuple(int(value) for value in _numbers("--lengths", self.lengths, whole=True)),
            depths=tuple(_numbers("--depths", self.depths, whole=False)),
            ruler_rows=self.tasks or RULER_ROWS,
        )


def _numbers(option: str, text: str, *, whole: bool) -> list[float]:
    from nemotron.errors import UserError

    try:
        return [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError:
        kind, example = ("whole numbers", "512,2048") if whole else ("numbers", "0,0.5,1")
        rule = f"is not a list of {kind}; write such as {example}."
        raise UserError(rule, key=option, value=text) from None
