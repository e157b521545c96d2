"""Tasks of lm-eval from others: their code runs only where the environment allows it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jinja2.sandbox import SandboxedEnvironment

from nemotron.errors import UserError
from nemotron.posttrain.sandbox.run import PERMIT, permits_code

Loads = Callable[..., Any]  # Any: a function of a task, or a metric


@contextmanager
def without_code() -> Iterator[None]:
    """Refuse what would run code of tasks outside lm-eval's own package.

    These are functions that a task names, templates that reach for Python's objects, and metrics
    that lie in a folder as programs. Neither lm-eval nor `evaluate` offers a switch for it.
    """
    if permits_code():
        yield
        return
    import evaluate
    from lm_eval import utils
    from lm_eval.tasks import _yaml_loader as loader

    home = Path(loader.__file__).resolve().parent
    sandboxed = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandboxed.filters |= utils.env.filters
    with ExitStack() as stack:
        for place, name, guarded in (
            (loader, "_import_func_in_yml", _of_package(loader._import_func_in_yml, home)),
            (utils, "env", sandboxed),
            (evaluate, "load", _of_name(evaluate.load)),
        ):
            stack.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, guarded)
        yield


def _of_package(loads: Loads, home: Path) -> Loads:
    """Return what finds the function that a task names, if the task is one of the package's."""

    def load(qualified: str, folder: Path) -> Any:
        if not folder.resolve().is_relative_to(home):
            raise UserError(_refusal(f"runs the code of {qualified}"), where=str(folder))
        return loads(qualified, folder)

    return load


def _of_name(loads: Loads) -> Loads:
    """Return what finds a metric by its name, unless that is a path."""

    def load(path: str, *rest: Any, **options: Any) -> Any:
        if "/" in path or Path(path).exists():
            raise UserError(_refusal("runs the code of a metric"), key="metric", value=path)
        return loads(path, *rest, **options)

    return load


def _refusal(what: str) -> str:
    return f"a task {what}; if you trust it, set {PERMIT}=1 in the environment."
