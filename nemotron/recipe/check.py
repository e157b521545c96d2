"""Rules across sections, and keys that would have no effect. Reads like a list."""

import re
from collections.abc import Iterator

from pydantic import BaseModel

from nemotron.errors import UserError
from nemotron.recipe.read import Path_, place_of
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import Course, plan_course

Finding = tuple[str, str]
"""A dotted key and what is wrong with it."""


def check(config: PretrainConfig, places: dict[Path_, str], source: str) -> None:
    """Raise UserError for the first rule that the recipe breaks."""
    given = {".".join(path) for path in places if not _is_default(config, path)}
    for key, problem in impossible(config):
        raise UserError(f"{_place(places, key, source)}: {key} {problem}")
    try:
        course = plan_course(config)
    except UserError as error:
        key = re.split(r"[ :]", str(error))[0]
        place = _place(places, key, source)
        raise UserError(f"{place}: {error}") from None
    for key, problem in without_effect(config, course, given):
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


def impossible(config: PretrainConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    model, data, batch = config.model, config.data, config.batch
    for key, seq_len in _row_lengths(config):
        if seq_len > model.max_position_embeddings:
            yield (
                key,
                f"= {seq_len} exceeds model.max_position_embeddings = "
                f"{model.max_position_embeddings}; shorten the rows or raise that limit.",
            )
    if batch.global_tokens % data.seq_len == 0 and (
        (rows := batch.global_tokens // data.seq_len) % batch.micro_batch
    ):
        near = min(
            (d for d in range(1, rows + 1) if rows % d == 0),
            key=lambda d: abs(d - batch.micro_batch),
        )
        yield (
            "batch.micro_batch",
            f"= {batch.micro_batch} does not divide the {rows} rows of a step "
            f"(batch.global_tokens / data.seq_len); the nearest is {near}.",
        )
    if model.mtp_pattern and config.loss.mtp_num_depths + 1 >= data.seq_len:
        yield (
            "loss.mtp_num_depths",
            f"= {config.loss.mtp_num_depths} leaves no targets in rows of data.seq_len = "
            f"{data.seq_len}.",
        )


def _row_lengths(config: PretrainConfig) -> Iterator[tuple[str, int]]:
    """Yield every length of row with its key."""
    yield "data.seq_len", config.data.seq_len
    for index, length in enumerate(config.data.lengths):
        yield f"data.lengths.{index}.seq_len", length.seq_len
    for number, phase in enumerate(config.phases):
        if phase.seq_len is not None:
            yield f"phases.{number}.seq_len", phase.seq_len
        for index, length in enumerate(phase.lengths):
            yield f"phases.{number}.lengths.{index}.seq_len", length.seq_len


def without_effect(config: PretrainConfig, course: Course, given: set[str]) -> Iterator[Finding]:
    """Yield the keys that were given a value of their own but change nothing in this recipe."""
    for keys, idle, because in _conditions(config, course):
        if idle:
            for key in keys:
                if key in given:
                    yield key, f"has no effect because {because}; remove the key."


def _conditions(config: PretrainConfig, course: Course) -> Iterator[tuple[list[str], bool, str]]:
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
        "loss.moe_aux_loss_coeff",
        "optimizer.router_bias_update_rate",
    ]
    experts.remove("model.n_groups")
    yield experts, "E" not in layers, "the pattern has no E layer"
    yield ["model.intermediate_size"], "-" not in layers, "the pattern has no - layer"
    ahead = [f"loss.{name}" for name in type(config.loss).model_fields if name.startswith("mtp_")]
    ahead.append("model.mtp_hybrid_override_pattern")
    yield ahead, not model.mtp_pattern, "model.num_nextn_predict_layers = 0"
    decay = ["schedule.decay", "schedule.decay_steps", "schedule.decay_tokens"]
    yield decay, schedule.kind != "wsd", f"schedule.kind = {schedule.kind}"
    yield ["schedule.min"], schedule.kind == "constant", "schedule.kind = constant"
    data = config.data
    embedded = any(leaf.source.path is None for leaf in course.timeline.leaves)
    yield ["data.validation_fraction"], not embedded, "no source is embedded text"
    whole = data.packing.kind != "concatenate"
    yield ["data.packing.long_documents"], not whole, "data.packing.kind = concatenate"
    yield ["data.mask_eod_loss"], whole, f"data.packing.kind = {data.packing.kind}"
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
