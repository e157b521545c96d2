"""Rules of fine-tuning recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.errors import Finding
from nemotron.model.parameters import by_kind
from nemotron.posttrain.sft_config import SftConfig
from nemotron.recipe import pretrain
from nemotron.recipe.read import Idle


def impossible(config: SftConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    yield from pretrain.impossible(config)
    if config.init_from is None:
        yield Finding(
            "init_from",
            "is absent; name the run, checkpoint or exported folder to fine-tune.",
        )
    if config.data.packing.kind == "concatenate" or config.data.packing.long_documents == "split":
        yield Finding(
            "data.packing",
            "would cut conversations; use kind: best_fit or sequential, and long_documents: drop "
            "or truncate.",
        )
    yield from untunable(config)


def untunable(config: SftConfig) -> Iterator[Finding]:
    """Yield what cannot be frozen."""
    has = by_kind(config.model)
    for part in config.tune.freeze:
        if part not in has:
            yield Finding(
                "tune.freeze", f"is not a part of this model; it has {', '.join(has)}.", part
            )
    if config.tune.freeze and config.parallel.pp != 1:
        yield Finding("parallel.pp", "cannot train beside tune.freeze; use 1.", config.parallel.pp)
    if set(has) <= set(config.tuning.freeze):
        yield Finding("tune.freeze", "leaves nothing to train; remove a part of the list.")


def idle(config: SftConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads.

    Raises:
        UserError: when the training plan is impossible.
    """
    read = ("data.validation_fraction", "data.packing.long_documents")
    for rule in pretrain.idle(config):
        yield Idle([key for key in rule.keys if key not in read], rule.holds, rule.because)
    ahead = ["loss.mtp_loss_factor", "loss.mtp_detach_heads"]
    yield Idle(ahead, not config.loss.mtp_num_depths, "loss.mtp_num_depths = 0")
