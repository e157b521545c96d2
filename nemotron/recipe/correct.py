"""Rules of correction recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.divisors import divisors, nearest
from nemotron.errors import Finding
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.recipe.read import Idle
from nemotron.train.schedule import build_schedule

HEADS = ("duration", "edit", "candidate")
OPTIONS = {
    "copies": ("ctc", "soft"),
    "pseudo_errors": ("soft",),
    "first_pseudo_errors": ("soft",),
    "first_steps": ("soft",),
    "anti_copy": ("soft",),
    "keep_loss": ("soft",),
    "threshold": ("soft",),
    "acoustic_weight": ("soft",),
    "duration_coeff": ("duration",),
    "edit_coeff": ("duration",),
    "candidate_coeff": ("duration",),
    "max_duration": ("duration",),
    "label_smoothing": ("soft", "duration"),
}
"""Kinds that read an option; the others are read by all."""


def impossible(config: CorrectConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    model, data, batch, kind = config.model, config.data, config.batch, config.correct.kind
    if data.seq_len > model.max_position_embeddings:
        yield Finding(
            "data.seq_len",
            f"exceeds model.max_position_embeddings = {model.max_position_embeddings}; shorten "
            "the rows or raise that limit.",
            data.seq_len,
        )
    if "M" not in model.hybrid_override_pattern:
        yield Finding(
            "model.hybrid_override_pattern",
            "has no M layer, without which slots would not know their place; add one.",
            model.hybrid_override_pattern,
        )
    if model.mtp_pattern:
        yield Finding(
            "model.num_nextn_predict_layers",
            "predicts tokens ahead, but slots are answered at their own place; write 0.",
            model.num_nextn_predict_layers,
        )
    yield from _heads(config)
    if batch.global_tokens % data.seq_len:
        near = max(1, round(batch.global_tokens / data.seq_len)) * data.seq_len
        yield Finding(
            "batch.global_tokens",
            f"is not a multiple of data.seq_len = {data.seq_len}; the nearest is {near}.",
            batch.global_tokens,
        )
    elif (rows := batch.global_tokens // data.seq_len) % batch.micro_batch:
        yield Finding(
            "batch.micro_batch",
            f"does not divide the {rows} rows of a step (batch.global_tokens / data.seq_len); the "
            f"nearest is {nearest(batch.micro_batch, divisors(rows))}.",
            batch.micro_batch,
        )
    for axis in config.unshared_axes if kind != "tag" else ():
        if (size := getattr(config.parallel, axis)) != 1:
            yield Finding(
                f"parallel.{axis}",
                f"cannot be shared by the slots of correct.kind = {kind} yet; share the weights by "
                "dp_shard or ep, and use 1.",
                size,
            )


def _heads(config: CorrectConfig) -> Iterator[Finding]:
    """Yield heads that the kind lacks, or does not train."""
    found, kind = config.model.edit_heads, config.correct.kind
    if kind == "duration" and set(found) != set(HEADS):
        yield Finding(
            "correct.kind",
            "needs the predictions of all heads; set model.correction.heads to [duration, edit, "
            "candidate].",
            kind,
        )
    if kind != "duration" and found:
        yield Finding(
            "model.correction.heads",
            f"is not trained by correct.kind = {kind}; leave it out, or use kind: duration.",
            f"[{', '.join(found)}]",
        )


def idle(config: CorrectConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads, and why.

    Raises:
        UserError: when the schedule is impossible.
    """
    build_schedule(config.schedule, config.batch.global_tokens)
    kind = config.correct.kind
    for name, kinds in OPTIONS.items():
        yield Idle([f"correct.{name}"], kind not in kinds, f"correct.kind = {kind}")
    first = ["correct.first_pseudo_errors"]
    yield Idle(first, not config.correct.first_steps, "correct.first_steps = 0")
    fixed = ("packing", "reset_documents")
    read = ("sources", "tokenizer", "eod_token", "seq_len", "verify_checksums", *fixed)
    unread = [f"data.{n}" for n in type(config.data).model_fields if n not in read]
    yield Idle(unread, True, "pairs are laid out in rows of their own")
    layers = config.model.hybrid_override_pattern
    yield Idle(["loss.moe_aux_loss_coeff"], "E" not in layers, "the pattern has no E layer")
    ahead = [f"loss.{name}" for name in type(config.loss).model_fields if name.startswith("mtp_")]
    yield Idle(ahead, True, "this stage predicts no tokens ahead")
