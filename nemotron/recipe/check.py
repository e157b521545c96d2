"""Which stage a recipe is for, the rules of all stages, and keys that would have no effect."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from nemotron.errors import Finding, UserError, show_value
from nemotron.recipe import languages
from nemotron.recipe.read import Idle, Path_, place_of
from nemotron.recipe.stages import DEFAULT, STAGES, Stage
from nemotron.train.config import RunConfig


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
    rule = f"is unknown; known are {', '.join(STAGES)}{hint}"
    raise UserError(rule, key="stage", value=name, where=place)


def check(config: RunConfig, stage: Stage, places: dict[Path_, str], source: str) -> None:
    """Raise UserError for the first rule that the recipe breaks."""
    given = {".".join(path) for path in places if not _is_default(config, path)}
    try:
        found = next(_findings(config, stage, given), None)
    except UserError as error:
        found = error.finding
    if found is not None:
        path = tuple(found.key.split("."))
        raise UserError.of(found).at(place_of(places, path, source))


def _is_default(config: RunConfig, path: Path_) -> bool:
    """Say whether a key was given the value that it has anyway."""
    value: Any = config
    for key in path:
        if not isinstance(value, BaseModel):
            break
        value = getattr(value, key)
    return bool(value in _defaults(config, path))


def _defaults(section: BaseModel, path: Path_, default: BaseModel | None = None) -> tuple[Any, ...]:
    """Return the values that a key has anyway; none where it must be given.

    `default` is the section's own default, where the class around it gives it one.
    """
    key, *rest = path
    value = getattr(section, key)
    field = type(section).model_fields[key]
    own = () if field.is_required() else (field.get_default(call_default_factory=True),)
    usual = own if default is None else (getattr(default, key),)
    if rest and isinstance(value, BaseModel):
        inner = next((section for section in usual if type(section) is type(value)), None)
        return _defaults(value, tuple(rest), inner)
    # a section that is given in part has its class's own default for the rest
    return (*usual, *own)


def _findings(config: RunConfig, stage: Stage, given: set[str]) -> Iterator[Finding]:
    """Yield contradictions, then keys that were given a value of their own but change nothing."""
    yield from stage.impossible(config)
    if (experts := config.model.language_experts) is not None:
        yield from languages.impossible(config, experts.languages)
    for conditions in (stage.idle(config), _idle(config)):
        for idle in conditions:
            for key in idle.keys if idle.holds else ():
                if key in given:
                    usual = _defaults(config, tuple(key.split(".")))
                    # whoever extends a file cannot remove its keys
                    other = f", or write its default, {show_value(usual[0])}" if usual else ""
                    rule = f"has no effect because {idle.because}; remove the key{other}."
                    yield Finding(key, rule)


def _idle(config: RunConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads."""
    model, schedule = config.model, config.schedule
    layers = model.hybrid_override_pattern + model.mtp_pattern
    fields = list(type(model).model_fields)

    def starting(*prefixes: str) -> list[str]:
        return [f"model.{name}" for name in fields if name.startswith(prefixes)]

    muon = [f"optimizer.muon.{name}" for name in type(config.optimizer.muon).model_fields]
    yield Idle(muon, config.optimizer.name != "muon", f"optimizer.name = {config.optimizer.name}")
    mamba = starting("mamba_", "n_groups", "ssm_", "conv_", "use_conv", "chunk_", "time_step")
    yield Idle(mamba, "M" not in layers, "the pattern has no M layer")
    attention = starting("num_attention_heads", "num_key_value_heads", "head_dim")
    yield Idle(attention, "*" not in layers, "the pattern has no * layer")
    experts = [
        *starting("n_routed", "num_experts", "moe_", "n_group", "topk_group", "norm_topk"),
        "model.routed_scaling_factor",
        "optimizer.router_bias_update_rate",
    ]
    experts.remove("model.n_groups")
    yield Idle(experts, "E" not in layers, "the pattern has no E layer")
    yield Idle(["model.intermediate_size"], "-" not in layers, "the pattern has no - layer")
    decay = [
        "schedule.decay",
        *(f"schedule.decay_{unit}" for unit in ("steps", "tokens", "fraction")),
    ]
    yield Idle(decay, schedule.kind != "wsd", f"schedule.kind = {schedule.kind}")
    yield Idle(["schedule.min"], schedule.kind == "constant", "schedule.kind = constant")
    ingredients = [f"precision.nvfp4.{name}" for name in type(config.precision.nvfp4).model_fields]
    yield Idle(ingredients, not config.precision.names("nvfp4"), "no layer is in nvfp4")
    delayed = [
        f"precision.fp8_delayed.{name}" for name in type(config.precision.fp8_delayed).model_fields
    ]
    yield Idle(delayed, not config.precision.names("fp8_delayed"), "no layer is in fp8_delayed")
    quantized = ["precision.backend", "precision.observe_every_steps"]
    yield Idle(quantized, not config.precision.quantizes, "no layer is quantized")
    suites = config.evaluation.suites
    asked = [f"evaluation.suites.{n}" for n in type(suites).model_fields if n != "names"]
    yield Idle(asked, not suites.names, "evaluation.suites.names is empty")
    thinking = ["evaluation.suites.enable_thinking"]
    yield Idle(thinking, suites.prompt == "text", "evaluation.suites.prompt = text")
    profile = ["profile.ranks", "profile.memory"]
    yield Idle(profile, not config.profile.steps, "profile.steps is empty")
    languages = ["loss.lid_coeff", "loss.lid_oracle_steps", "data.language_of"]
    yield Idle(languages, model.language_experts is None, "model.language_experts is absent")
    unknown = getattr(config.data, "language_of", "none") == "none"
    yield Idle(["loss.lid_coeff"], unknown, "data.language_of = none")
    trackers = config.logging.trackers
    yield Idle(["logging.project"], not trackers, "logging.trackers is empty")
