"""Rules of distillation recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.errors import Finding
from nemotron.posttrain.sft_config import DistillConfig
from nemotron.recipe.sft import impossible_chats


def impossible(config: DistillConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    yield from impossible_chats(config)
    top_k = config.distillation.top_k
    if top_k is not None and top_k >= config.model.vocab_size:
        yield Finding(
            "distillation.top_k",
            f"is not below model.vocab_size = {config.model.vocab_size}; leave it out to compare "
            "the whole vocabulary.",
            top_k,
        )
    for axis in ("pp", "tp", "cp"):
        if (size := getattr(config.parallel, axis)) != 1:
            yield Finding(
                f"parallel.{axis}",
                "cannot compare distributions yet; share the weights by dp_shard or ep, and use 1.",
                size,
            )
    if config.quantization is not None:
        yield from _unquantizable(config)


def _unquantizable(config: DistillConfig) -> Iterator[Finding]:
    """Yield what a student with fixed scales does not work beside."""
    if config.init_from is None:
        yield Finding(
            "init_from", "is absent; name the run that quantization.like was quantized from."
        )
    if config.precision.quantizes:
        yield Finding(
            "precision.preset",
            "gives layers formats that quantization.like gives them, too; use none or bf16.",
            config.precision.preset,
        )
    if config.tune.adapter is not None:
        yield Finding("tune.adapter", "cannot be trained under fixed scales; leave it out.")
    if config.parallel.ep != 1:
        yield Finding(
            "parallel.ep",
            "does not share experts with fixed scales yet; use 1, and dp_shard.",
            config.parallel.ep,
        )
