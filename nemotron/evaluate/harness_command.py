"""Evaluating a model on tasks of lm-evaluation-harness."""

import difflib
import importlib.util
import json
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from nemotron.checkpoint.manifest import code_version
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.files import write_json, write_text
from nemotron.generate.decode_layers import prepare_weights
from nemotron.hf.hub import find_folder
from nemotron.loading import load_with_tokenizer, read_chat_files, recipe_ops, stop_ids
from nemotron.outputs import check_new
from nemotron.serve.conversation import ChatFormat
from nemotron.terminal import print_text

INSTALL = "pip install 'nemotron-train[lm-eval]'"
BOOTSTRAP = 1000
"""Resamplings for the standard error of a metric that has no formula for it."""
SHOWN = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
"""What of lm-eval's results is written."""
ADAPTER = "nemotron.evaluate.harness"
"""Module that lm-eval calls."""


@dataclass(frozen=True)
class Harness:
    """Which tasks a model is evaluated on, and how."""

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    chat: bool = False
    thinking: bool = True
    strip_reasoning: bool = False
    rows: int = 16
    slots: int = 64
    samples: Path | None = None


def evaluate_tasks(model: Path, wanted: Harness, *, out: Path | None, device: str) -> int:
    """Print what a model reaches on tasks of lm-eval; returns the exit code.

    `out` is a file of JSON.

    Raises:
        UserError: when lm-eval, the model, a task or its data is absent, or a file exists already.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"nemotron lm-eval needs the package lm_eval; install it with: {INSTALL}.")
    for key, file in (("--out", out), ("--samples", wanted.samples)):
        if file is not None:
            check_new(file, key)
    if wanted.include_path is not None and not wanted.include_path.is_dir():
        raise UserError(
            "is not a folder; give one.", key="--include-path", value=wanted.include_path
        )
    from nemotron.evaluate.foreign_tasks import without_code

    with _quiet(), without_code():
        found = _evaluate(model, wanted, device)
    from lm_eval.utils import make_table

    print_text(make_table(found).rstrip())
    if "groups" in found:
        print_text(make_table(found, "groups").rstrip())
    if out is not None:
        facts = {"model": str(model), "version": code_version(), "lm_eval": _version()}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, facts | {key: found[key] for key in SHOWN if key in found})
        print_text(f"written to {out}")
    if wanted.samples is not None:
        lines = [
            json.dumps({"task": task, **sample}, default=str, ensure_ascii=False) + "\n"
            for task, samples in found["samples"].items()
            for sample in samples
        ]
        wanted.samples.parent.mkdir(parents=True, exist_ok=True)
        write_text(wanted.samples, "".join(lines))
        print_text(f"written to {wanted.samples}")
    return DONE


def _evaluate(model: Path, wanted: Harness, device: str) -> dict[str, Any]:  # Any: JSON
    from lm_eval.evaluator import simple_evaluate

    from nemotron.evaluate.harness import HarnessLM

    tasks, manager = _find_tasks(wanted)
    lm = HarnessLM(
        read_subject(model, device),
        wanted.rows,
        wanted.slots,
        thinks=wanted.thinking,
        strips=wanted.strip_reasoning,
    )
    try:
        found = simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=wanted.num_fewshot,
            limit=wanted.limit,
            apply_chat_template=wanted.chat,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
        )
    except TemplateError as error:
        raise UserError(f"a task's template fails: {error}; correct its YAML file.") from None
    except Exception as error:
        if isinstance(error, UserError) or _is_ours(error):
            raise
        rule = f"a task cannot be asked: {_cause(error)}; correct its YAML file or its data."
        raise UserError(rule) from error
    assert found is not None, "this process has rank 0"
    return dict(found)


def read_subject(model: Path, device: str) -> Any:  # Any: Subject, whose module needs lm-eval
    """Return the model as the adapter takes it, with weights prepared for decoding.

    Raises:
        UserError: when the model, its tokenizer or the device is absent.
    """
    from nemotron.evaluate.harness import Subject

    target = find_device(device)
    loaded, tokenizer = load_with_tokenizer(model, ops=recipe_ops(model))
    files = read_chat_files(model)
    return Subject(
        str(find_folder(model)),
        prepare_weights(loaded.to(target)),
        tokenizer,
        stop_ids(model, loaded.config),
        ChatFormat.of(tokenizer, files.template, files.stop_ids),
        files.template,
    )


def _find_tasks(wanted: Harness) -> tuple[list[Any], Any]:  # Any: classes of lm-eval
    """Return the tasks, read, and lm-eval's index of them.

    The package's own tasks are indexed only where a name is not found otherwise, because that
    takes seconds.

    Raises:
        UserError: when there is no such task, or it cannot be read.
    """
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=wanted.include_path, include_defaults=False)
    if _unknown(wanted.tasks, manager):
        manager = TaskManager(include_path=wanted.include_path)
    for name in _unknown(wanted.tasks, manager):
        close = difflib.get_close_matches(name, manager.all_tasks, 3)
        rule = (
            f"is not a task; {'close to it are ' + ', '.join(close) if close else 'give another'}."
        )
        raise UserError(rule, key="TASK", value=name)
    for name in wanted.tasks:
        try:
            manager.load([name])
        except UserError:
            raise
        except Exception as error:  # what lm-eval makes of a task that is wrong, or has no data
            rule = f"cannot be read: {_cause(error)}; mend its YAML file, or bring its data here."
            raise UserError(rule, key="TASK", value=name) from error
    return list(wanted.tasks), manager


def _cause(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_ours(error: Exception) -> bool:
    """Say whether our adapter was at work, and not what lm-eval does with a task's data."""
    modules = {frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)}
    return ADAPTER in modules


def _unknown(names: Sequence[str], manager: Any) -> list[str]:  # Any: lm-eval's index
    return [
        name
        for name in names
        if name not in manager.all_tasks and not (name.endswith(".yaml") and Path(name).is_file())
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warnings of other packages, and let lm-eval start no processes.

    It would copy this one, whose threads may hold locks.
    """
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
