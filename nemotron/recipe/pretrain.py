"""Rules of pre-training recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.data.prepare.inputs import is_text
from nemotron.divisors import divisors, nearest
from nemotron.errors import Finding
from nemotron.recipe.read import Idle
from nemotron.train.config import PretrainConfig
from nemotron.train.schedule import plan_training


def impossible(config: PretrainConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    model, data, batch = config.model, config.data, config.batch
    for key, seq_len in _row_lengths(config):
        if seq_len > model.max_position_embeddings:
            yield Finding(
                key,
                f"exceeds model.max_position_embeddings = "
                f"{model.max_position_embeddings}; shorten the rows or raise that limit.",
                seq_len,
            )
    if batch.global_tokens % data.seq_len == 0 and (
        (rows := batch.global_tokens // data.seq_len) % batch.micro_batch
    ):
        near = nearest(batch.micro_batch, divisors(rows))
        yield Finding(
            "batch.micro_batch",
            f"does not divide the {rows} rows of a step "
            f"(batch.global_tokens / data.seq_len); the nearest is {near}.",
            batch.micro_batch,
        )
    if model.mtp_pattern and config.loss.mtp_num_depths + 1 >= data.seq_len:
        yield Finding(
            "loss.mtp_num_depths",
            f"leaves no targets in rows of data.seq_len = {data.seq_len}.",
            config.loss.mtp_num_depths,
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


def idle(config: PretrainConfig) -> Iterator[Idle]:
    """Yield keys of the training plan, loss and data that nothing reads.

    Raises:
        UserError: when the training plan is impossible.
    """
    plan = plan_training(config)
    model = config.model
    layers = model.hybrid_override_pattern + model.mtp_pattern
    yield Idle(["loss.moe_aux_loss_coeff"], "E" not in layers, "the pattern has no E layer")
    ahead = [f"loss.{name}" for name in type(config.loss).model_fields if name.startswith("mtp_")]
    ahead.append("model.mtp_hybrid_override_pattern")
    yield Idle(ahead, not model.mtp_pattern, "model.num_nextn_predict_layers = 0")
    data, leaves = config.data, plan.timeline.leaves
    text = any(leaf.source.path is None or is_text(leaf.source.path) for leaf in leaves)
    yield Idle(["data.validation_fraction"], not text, "no source is text")
    whole = data.packing.kind != "concatenate"
    yield Idle(["data.packing.long_documents"], not whole, "data.packing.kind = concatenate")
    yield Idle(["data.mask_eod_loss"], whole, f"data.packing.kind = {data.packing.kind}")
