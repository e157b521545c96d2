"""Rules of fine-tuning recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.errors import Finding
from nemotron.model.config import ModelConfig
from nemotron.model.parameters import by_kind
from nemotron.posttrain.sft_config import ChatRunConfig, SftConfig, TunedConfig
from nemotron.recipe import pretrain
from nemotron.recipe.read import Idle
from nemotron.train.config import TuneConfig


def impossible(config: SftConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    yield from impossible_chats(config)
    if config.init_from is None:
        yield Finding(
            "init_from",
            "is absent; name the run, checkpoint or exported folder to fine-tune.",
        )


def impossible_chats(config: TunedConfig) -> Iterator[Finding]:
    """Yield those of every stage that learns from conversations."""
    yield from pretrain.impossible(config)
    if config.data.packing.kind == "concatenate" or config.data.packing.long_documents == "split":
        yield Finding(
            "data.packing",
            "would cut conversations; use kind: best_fit or sequential, and long_documents: drop "
            "or truncate.",
        )
    yield from untunable(config)


def untunable(config: TunedConfig) -> Iterator[Finding]:
    """Yield what cannot be frozen."""
    yield from unknown_parts(config.model, config.tune)
    has = by_kind(config.model)
    is_partial = config.tuning.freeze and config.tune.adapter is None
    if is_partial and config.parallel.pp != 1:
        yield Finding(
            "parallel.pp", "does not synchronize frozen parts yet; use 1.", config.parallel.pp
        )
    if config.tune.adapter is not None:
        yield from _unadaptable(config)
    if set(has) <= set(config.tuning.freeze):
        yield Finding("tune.freeze", "leaves nothing to train; remove a part of the list.")


def unknown_parts(model: ModelConfig, tune: TuneConfig) -> Iterator[Finding]:
    """Yield frozen parts that a model does not have."""
    has = by_kind(model)
    for part in tune.freeze:
        if part not in has:
            yield Finding(
                "tune.freeze", f"is not a part of this model; it has {', '.join(has)}.", part
            )


def _unadaptable(config: TunedConfig) -> Iterator[Finding]:
    """Yield what adapters do not work beside."""
    adapter, parallel = config.tune.adapter, config.parallel
    assert adapter is not None
    if adapter.kind == "dora" and "experts" in adapter.targets:
        yield Finding(
            "tune.adapter.targets",
            "is not adapted by kind: dora; use lora, or leave it out.",
            "experts",
        )
    if config.precision.quantizes:
        yield Finding(
            "precision.preset",
            "quantizes layers that adapters change; use none or bf16.",
            config.precision.preset,
        )
    for axis in ("pp", "tp"):
        if (size := getattr(parallel, axis)) != 1:
            yield Finding(
                f"parallel.{axis}",
                "does not cut adapters yet; share the weights by dp_shard, and use 1.",
                size,
            )
    if (
        parallel.ep != 1
        and adapter.kind == "lora"
        and (not adapter.targets or "experts" in adapter.targets)
    ):
        yield Finding(
            "parallel.ep",
            "does not cut adapters of experts yet; use 1, or tune.adapter.targets without experts.",
            parallel.ep,
        )


def idle(config: ChatRunConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads.

    Raises:
        UserError: when the training plan is impossible.
    """
    yield from idle_of_chats(config)
    ahead = ["loss.mtp_loss_factor", "loss.mtp_detach_heads"]
    yield Idle(ahead, not config.loss.mtp_num_depths, "loss.mtp_num_depths = 0")
    rates = ["data.chat.reasoning_off_rate", "data.chat.reasoning_budget_rate"]
    thinks = config.data.chat.enable_thinking
    yield Idle(rates, not thinks, "data.chat.enable_thinking = false")


def idle_of_chats(config: TunedConfig) -> Iterator[Idle]:
    """Yield those of every stage that learns from conversations.

    Raises:
        UserError: when the training plan is impossible.
    """
    read = ("data.validation_fraction", "data.packing.long_documents")
    for rule in pretrain.idle(config):
        yield Idle([key for key in rule.keys if key not in read], rule.holds, rule.because)
