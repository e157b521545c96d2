"""How far a model is from another one that it should replace, over the tokens of some text."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM

POSITIONS = 512
"""Places whose distributions over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class Agreement:
    """What replacing the reference by the model changes; means over the tokens, in nats."""

    loss: float
    """Cross entropy of the model."""
    reference_loss: float
    """Cross entropy of the reference."""
    kl: float
    """KL(reference || model)."""
    top1: float
    """Share of the tokens for which both find the same one likeliest."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"loss {self.reference_loss:.5f} -> {self.loss:.5f}  KL {self.kl:.6f} nats a token  "
            f"same likeliest token {self.top1:.2%}  {self.tokens} tokens"
        )


@torch.no_grad()
def agreement(model: HybridLM, reference: HybridLM, batches: Iterable[Batch]) -> Agreement:
    """Compare what two models predict wherever a batch has a label.

    Each model computes on the device and in the dtype that it is in; distributions are float32,
    sums float64.

    Raises:
        UserError: when the vocabularies differ, or no batch has a label.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise UserError(
            f"the models have vocabularies of {model.config.vocab_size} and "
            f"{reference.config.vocab_size} tokens; compare models with one tokenizer."
        )
    sums, tokens = torch.zeros(4, dtype=torch.float64), 0
    for batch in batches:
        labels = batch.labels[batch.labels != NO_LABEL]
        ours, theirs = _labeled(model, batch), _labeled(reference, batch)
        parts = (some.split(POSITIONS) for some in (ours, theirs, labels))
        for mine, other, right in zip(*parts, strict=True):
            found = _logprobs(model, mine)
            sums += _sums(found, _logprobs(reference, other).to(found.device), right)
        tokens += len(labels)
    if not tokens:
        raise UserError("there is no text to compare the models on; give at least one token.")
    loss, reference_loss, kl, same = (sums / tokens).tolist()
    return Agreement(loss, reference_loss, kl, same, tokens)


def pooled(parts: Iterable[Agreement]) -> Agreement:
    """Return the agreement over the tokens of all parts."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)

    def mean(values: Iterable[float]) -> float:
        pairs = zip(values, parts, strict=True)
        return sum(value * part.tokens for value, part in pairs) / tokens

    return Agreement(
        mean(part.loss for part in parts),
        mean(part.reference_loss for part in parts),
        mean(part.kl for part in parts),
        mean(part.top1 for part in parts),
        tokens,
    )


def _sums(
    found: Float[Tensor, "M V"], wanted: Float[Tensor, "M V"], labels: Int[Tensor, " M"]
) -> Float[Tensor, "4"]:
    """Return both cross entropies, the divergence and the number of equal first choices."""
    picked = labels.to(found.device).unsqueeze(-1)
    terms = (
        -found.gather(-1, picked).squeeze(-1),
        -wanted.gather(-1, picked).squeeze(-1),
        (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64),
        wanted.argmax(-1) == found.argmax(-1),
    )
    return torch.stack([term.sum(dtype=torch.float64) for term in terms]).cpu()


def _labeled(model: HybridLM, batch: Batch) -> Float[Tensor, "M D"]:
    """Return the hidden states at the places that have a label."""
    batch = batch.to(model.backbone.embeddings.weight.device)
    return model(batch.input_ids, batch.seq_idx)[batch.labels != NO_LABEL]


def _logprobs(model: HybridLM, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
    return model.logits(hidden).float().log_softmax(-1)
