"""What quantization changes: loss, divergence and first choice on held-out text."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemotron.data.batch import NO_LABEL
from nemotron.data.loader import TrainingData
from nemotron.model.hybrid import HybridLM
from nemotron.model.linear import ROWS_COMPARED


@dataclass(frozen=True)
class Comparison:
    """A model beside the one that it was made of, on the same tokens."""

    loss_before: float = 0.0
    """Mean nats of the next token."""
    loss_after: float = 0.0
    kl: float = 0.0
    """Mean nats by which the distributions after diverge from those before."""
    top1: float = 0.0
    """Share of tokens at which both hold the same token for the likeliest."""
    tokens: int = 0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.loss_before + other.loss_before,
            self.loss_after + other.loss_after,
            self.kl + other.kl,
            self.top1 + other.top1,
            self.tokens + other.tokens,
        )

    def mean(self) -> "Comparison":
        """Return means of what was summed."""
        n = max(1, self.tokens)
        return Comparison(
            self.loss_before / n, self.loss_after / n, self.kl / n, self.top1 / n, self.tokens
        )


@torch.no_grad()
def compare(
    before: HybridLM, after: HybridLM, data: TrainingData, *, tokens: int, rows: int
) -> dict[str, Comparison]:
    """Return the comparison for each domain of what is held out, and for `all` of them."""
    device = before.backbone.embeddings.weight.device
    found: dict[str, Comparison] = {}
    for domain in data.validation_domains:
        sums = Comparison()
        for held_out in data.validation(domain, tokens=tokens, rows=rows):
            batch = held_out.batch.to(device)
            batch = batch if data.config.reset_documents else replace(batch, seq_idx=None)
            hidden = [model(batch.input_ids, batch.seq_idx) for model in (before, after)]
            counted = batch.labels != NO_LABEL
            sums += _sums(
                before, after, hidden[0][counted], hidden[1][counted], batch.labels[counted]
            )
        found[domain] = sums
    total = sum(found.values(), start=Comparison())
    return {name: sums.mean() for name, sums in (found | {"all": total}).items()}


def _sums(
    before: HybridLM, after: HybridLM, theirs: Tensor, ours: Tensor, labels: Tensor
) -> Comparison:
    total = Comparison()
    for first in range(0, labels.shape[0], ROWS_COMPARED):
        which = slice(first, first + ROWS_COMPARED)
        p = before.logits(theirs[which]).float().log_softmax(-1)
        q = after.logits(ours[which]).float().log_softmax(-1)
        picked = labels[which, None]
        total += Comparison(
            -p.gather(-1, picked).double().sum().item(),
            -q.gather(-1, picked).double().sum().item(),
            (p.exp() * (p - q)).sum(-1).double().sum().item(),
            float((p.argmax(-1) == q.argmax(-1)).sum().item()),
            labels[which].shape[0],
        )
    return total
