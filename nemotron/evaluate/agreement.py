"""How far a model is from another one that it should replace, over the tokens of some text."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM

POSITIONS = 512
"""Places whose distributions over the vocabulary are in memory at once."""


@dataclass(frozen=True)
class Agreement:
    """What replacing the reference by the model changes."""

    kl: float
    """Mean of KL(reference || model) over the tokens, in nats."""
    top1: float
    """Share of the tokens for which both find the same one likeliest."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.6f} nats a token  same likeliest token {self.top1:.2%}  "
            f"{self.tokens} tokens"
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
    kl, same, tokens = 0.0, 0, 0
    for batch in batches:
        ours, theirs = _labeled(model, batch), _labeled(reference, batch)
        for mine, other in zip(ours.split(POSITIONS), theirs.split(POSITIONS), strict=True):
            found = _logprobs(model, mine)
            wanted = _logprobs(reference, other).to(found.device)
            kl += (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64).sum().item()
            same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        tokens += ours.shape[0]
    if not tokens:
        raise UserError("there is no text to compare the models on; give at least one token.")
    return Agreement(kl / tokens, same / tokens, tokens)


def _labeled(model: HybridLM, batch: Batch) -> Float[Tensor, "M D"]:
    """Return the hidden states at the places that have a label."""
    batch = batch.to(model.backbone.embeddings.weight.device)
    return model(batch.input_ids, batch.seq_idx)[batch.labels != NO_LABEL]


def _logprobs(model: HybridLM, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
    return model.logits(hidden).float().log_softmax(-1)
