"""The stages of training that a recipe can name, each with its class and its rules."""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemotron.errors import Finding, UserError
from nemotron.recipe import pretrain
from nemotron.recipe.read import Idle, Path_, place_of
from nemotron.train.config import PretrainConfig, RunConfig

DEFAULT = "pretrain"
"""Stage of a recipe that names none."""


@dataclass(frozen=True)
class Stage:
    """What a recipe of one stage consists of, and which rules it has beside those of all."""

    recipe: type[RunConfig]
    impossible: Callable[[Any], Iterator[Finding]] = lambda _: iter(())
    """Yields the values of a recipe that contradict each other."""
    idle: Callable[[Any], Iterator[Idle]] = lambda _: iter(())
    """Yields keys that nothing reads; raises UserError for a bad schedule."""


STAGES = {"pretrain": Stage(PretrainConfig, pretrain.impossible, pretrain.idle)}


def find_stage(values: Mapping[str, Any], places: dict[Path_, str], source: str) -> Stage:
    """Return the stage that the values of a recipe name.

    Raises:
        UserError: when there is no such stage, with those that there are.
    """
    name = values.get("stage", DEFAULT)
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    near = difflib.get_close_matches(str(name), list(STAGES), 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    place = place_of(places, ("stage",), source)
    raise UserError(f"{place}: stage = {name} is unknown; known are {', '.join(STAGES)}{hint}")
