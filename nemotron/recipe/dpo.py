"""Rules of recipes of preference optimization across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.errors import Finding
from nemotron.posttrain.preference.config import DpoConfig
from nemotron.recipe.read import Idle
from nemotron.recipe.sft import idle_of_chats, impossible_chats


def impossible(config: DpoConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    yield from impossible_chats(config)
    if config.init_from is None:
        yield Finding(
            "init_from", "is absent; name the run, checkpoint or exported folder to begin with."
        )
    if config.data.packing.long_documents != "drop":
        yield Finding(
            "data.packing.long_documents",
            "would cut a pair of answers; use drop, and longer rows.",
            config.data.packing.long_documents,
        )


def idle(config: DpoConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads.

    Raises:
        UserError: when the training plan is impossible.
    """
    yield from idle_of_chats(config)
    ahead = [f"loss.{name}" for name in type(config.loss).model_fields if name.startswith("mtp_")]
    yield Idle(ahead, True, "answers are not predicted further ahead")
    yield Idle(["data.objective"], True, "every pair counts alike")
    sft = ["dpo.sft_average_log_probs"]
    yield Idle(sft, not config.dpo.sft_loss_weight, "dpo.sft_loss_weight = 0")
