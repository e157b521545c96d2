"""The command that evaluates a model on tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup, Device, Model

app = CommandGroup()


@app.command("lm-eval", epilog="Example: nemotron lm-eval runs/tiny my_task --include-path tasks")
def lm_eval(
    model: Model,
    tasks: Annotated[
        list[str],
        typer.Argument(metavar="TASK", help="Names of tasks or groups, or their YAML files."),
    ],
    include_path: Annotated[Path | None, typer.Option(help="Folder of more tasks.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt; default: as the task says.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Most questions of a task; default: all.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat format.")] = False,
    thinking: Annotated[bool, typer.Option(help="Ask for reasoning (--chat).")] = True,
    strip_reasoning: Annotated[
        bool,
        typer.Option(
            "--strip-reasoning",
            help="Score what follows </think> alone; stop strings count from there.",
        ),
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="Texts that are scored at a time.")] = 16,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are written at a time.")] = 64,
    out: Annotated[Path | None, typer.Option(help="File of JSON to write.")] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="File of JSON lines: each question with its answers and scores."),
    ] = None,
    device: Device = "auto",
) -> int:
    """Print what a model reaches on tasks of lm-evaluation-harness."""
    from nemotron.errors import UserError
    from nemotron.evaluate.harness_command import Harness, evaluate_tasks

    if not thinking and not chat:
        raise UserError("goes with --chat; give it, too.", key="--no-thinking")
    wanted = Harness(
        tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        chat=chat,
        thinking=thinking,
        strip_reasoning=strip_reasoning,
        rows=rows,
        slots=slots,
        samples=samples,
    )
    return evaluate_tasks(model, wanted, out=out, device=device)
