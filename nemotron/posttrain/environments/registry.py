"""The built-in environments by name."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments.arith_chain import ArithChain
from nemotron.posttrain.environments.base import Environment
from nemotron.posttrain.environments.code_exec import CodeExec
from nemotron.posttrain.environments.file_rows import OwnRows
from nemotron.posttrain.environments.gym_sets import ReasoningGym
from nemotron.posttrain.environments.if_constraints import IfConstraints
from nemotron.posttrain.environments.json_schema import JsonSchema
from nemotron.posttrain.environments.judge import Judge
from nemotron.posttrain.environments.long_context import LongContext
from nemotron.posttrain.environments.math_symbolic import MathSymbolic
from nemotron.posttrain.environments.mcqa import MultipleChoice
from nemotron.posttrain.environments.pivot import Pivot
from nemotron.posttrain.environments.remote import HttpEnv
from nemotron.posttrain.environments.text_to_sql import TextToSql
from nemotron.posttrain.environments.tool_calc_db import ToolCalcDb

ENVIRONMENTS: dict[str, type[Environment]] = {
    "arith_chain": ArithChain,
    "code_exec": CodeExec,
    "if_constraints": IfConstraints,
    "json_schema": JsonSchema,
    "judge": Judge,
    "long_context": LongContext,
    "math_symbolic": MathSymbolic,
    "mcqa": MultipleChoice,
    "pivot": Pivot,
    "reasoning_gym": ReasoningGym,
    "text_to_sql": TextToSql,
    "tool_calc_db": ToolCalcDb,
}

DATA = "data"
"""Option with a file of rows."""


def find_environment(name: str, options: Mapping[str, Any] | None = None) -> Environment:
    """Return the environment of this name, made with its options.

    The option `data` of every environment is a file of rows, in place of those that it generates.
    With the option `url` it is one on a server of NVIDIA-NeMo/Gym's protocol, under any name.

    Raises:
        UserError: when there is none, with those that there are.
    """
    given = dict(options or {})
    kind = HttpEnv if "url" in given else ENVIRONMENTS.get(name)
    if kind is not None:
        own = _options_of(kind)
        known = own if DATA in own else [*own, DATA]
        for option in given:
            if option not in known:
                rule = f"is not an option; it has {', '.join(known)}."
                raise UserError(rule, key=option[:60], where=f"environments: {name}")
        data = None if DATA in own else given.pop(DATA, None)
        if kind is Pivot and given.get("verifier") is not None:
            given["verifier"] = _verifier(given["verifier"])
        environment = HttpEnv(name, **given) if kind is HttpEnv else kind(**given)
        return environment if data is None else OwnRows(environment, data)
    near = difflib.get_close_matches(name, list(ENVIRONMENTS), 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ENVIRONMENTS)}."
    raise UserError(f"is unknown; {hint}", key="name", value=name, where="environments")


def _verifier(given: Any) -> Environment:  # Any: a value of a recipe
    """Return the environment that judges in place of another: its name, or also its options.

    Raises:
        UserError: when there is none.
    """
    named = given if isinstance(given, Mapping) else {"name": given}
    if not isinstance(named.get("name"), str) or named.keys() - {"name", "options"}:
        raise UserError(
            "is not an environment; give its name, or {name: NAME, options: {...}}.",
            key="verifier",
            where="environments: pivot",
        )
    return find_environment(named["name"], named.get("options"))


def _options_of(kind: type[Environment]) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name != "name"]
