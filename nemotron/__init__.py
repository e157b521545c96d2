"""Train hybrid Mamba-2 / attention / mixture-of-experts language models as Nemotron 3 was."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron.errors import UserError
    from nemotron.generate.engine import Engine
    from nemotron.generate.request import Answer, Event, Request
    from nemotron.generate.sampling import Sampling
    from nemotron.generate.speculate import Speculation
    from nemotron.loading import load, load_with_tokenizer
    from nemotron.recipe.load import load_recipe
    from nemotron.session import Session
    from nemotron.train.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "Engine",
    "Event",
    "Request",
    "Sampling",
    "Session",
    "Speculation",
    "Trainer",
    "UserError",
    "__version__",
    "load",
    "load_recipe",
    "load_with_tokenizer",
]

_HOMES = {
    "load": "nemotron.loading",
    "load_with_tokenizer": "nemotron.loading",
    "load_recipe": "nemotron.recipe.load",
    "Session": "nemotron.session",
    "Trainer": "nemotron.train.trainer",
    "Answer": "nemotron.generate.request",
    "Engine": "nemotron.generate.engine",
    "Event": "nemotron.generate.request",
    "Request": "nemotron.generate.request",
    "Sampling": "nemotron.generate.sampling",
    "Speculation": "nemotron.generate.speculate",
    "UserError": "nemotron.errors",
}
"""The module of each public name, imported when the name is first used."""


def __getattr__(name: str) -> Any:  # Any: whatever the name is
    if name not in _HOMES:
        raise AttributeError(f"module 'nemotron' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
