"""Rules for recipes of every stage, and keys that would have no effect. Reads like a list."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from nemotron.errors import UserError
from nemotron.recipe.read import Finding, Idle, Path_, place_of
from nemotron.recipe.stages import Stage
from nemotron.train.config import RunConfig


def check(config: RunConfig, stage: Stage, places: dict[Path_, str], source: str) -> None:
    """Raise UserError for the first rule that the recipe breaks."""
    given = {".".join(path) for path in places if not _is_default(config, path)}
    try:
        found = next(_findings(config, stage, given), None)
    except UserError as error:
        key = re.split(r"[ :]", str(error))[0]
        raise UserError(f"{_place(places, key, source)}: {error}") from None
    if found is not None:
        key, problem = found
        raise UserError(f"{_place(places, key, source)}: {key} {problem}")


def _place(places: dict[Path_, str], key: str, source: str) -> str:
    return place_of(places, tuple(key.split(".")), source)


def _is_default(section: BaseModel, path: Path_) -> bool:
    """Say whether a key was given the value that it has anyway."""
    key, *rest = path
    value = getattr(section, key)
    if rest and isinstance(value, BaseModel):
        return _is_default(value, tuple(rest))
    return bool(value == type(section).model_fields[key].default)


def _findings(config: RunConfig, stage: Stage, given: set[str]) -> Iterator[Finding]:
    """Yield contradictions, then keys that were given a value of their own but change nothing."""
    yield from stage.impossible(config)
    for conditions in (stage.idle(config), _idle(config)):
        for keys, is_idle, because in conditions:
            if is_idle:
                for key in keys:
                    if key in given:
                        yield key, f"has no effect because {because}; remove the key."


def _idle(config: RunConfig) -> Iterator[Idle]:
    """Yield keys, whether nothing reads them, and why."""
    model, schedule = config.model, config.schedule
    layers = model.hybrid_override_pattern + model.mtp_pattern
    fields = list(type(model).model_fields)

    def starting(*prefixes: str) -> list[str]:
        return [f"model.{name}" for name in fields if name.startswith(prefixes)]

    mamba = starting("mamba_", "n_groups", "ssm_", "conv_", "use_conv", "chunk_", "time_step")
    yield mamba, "M" not in layers, "the pattern has no M layer"
    attention = starting("num_attention_heads", "num_key_value_heads", "head_dim")
    yield attention, "*" not in layers, "the pattern has no * layer"
    experts = [
        *starting("n_routed", "num_experts", "moe_", "n_group", "topk_group", "norm_topk"),
        "model.routed_scaling_factor",
        "optimizer.router_bias_update_rate",
    ]
    experts.remove("model.n_groups")
    yield experts, "E" not in layers, "the pattern has no E layer"
    yield ["model.intermediate_size"], "-" not in layers, "the pattern has no - layer"
    decay = [
        "schedule.decay",
        *(f"schedule.decay_{unit}" for unit in ("steps", "tokens", "fraction")),
    ]
    yield decay, schedule.kind != "wsd", f"schedule.kind = {schedule.kind}"
    yield ["schedule.min"], schedule.kind == "constant", "schedule.kind = constant"
    ingredients = [f"precision.nvfp4.{name}" for name in type(config.precision.nvfp4).model_fields]
    yield ingredients, not config.precision.names("nvfp4"), "no layer is in nvfp4"
    late = [
        f"precision.fp8_delayed.{name}" for name in type(config.precision.fp8_delayed).model_fields
    ]
    yield late, not config.precision.names("fp8_delayed"), "no layer is in fp8_delayed"
    quantized = ["precision.backend", "precision.observe_every_steps"]
    yield quantized, not config.precision.quantizes, "no layer is quantized"
    trackers = config.logging.trackers
    yield ["logging.project"], not trackers, "logging.trackers is empty"
