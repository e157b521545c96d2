"""Validation: loss, perplexity and bits per byte, for each domain and over all of them."""

import math
from dataclasses import dataclass

import torch

from nemotron.data.loader import TrainingData
from nemotron.model.hybrid import HybridLM


@dataclass(frozen=True)
class Sums:
    """Nats lost on held-out text, the tokens predicted, and the bytes that they stand for."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def metrics(self, name: str) -> dict[str, float]:
        """Return the derived values; absent where there is nothing to divide by."""
        values = {}
        if self.tokens:
            loss = self.nats / self.tokens
            values[f"{name}/loss"] = loss
            values[f"{name}/perplexity"] = math.exp(min(loss, 700.0))
        if self.bytes:
            # comparable between tokenizers, unlike the loss per token
            values[f"{name}/bits_per_byte"] = self.nats / (math.log(2) * self.bytes)
        return values


@torch.no_grad()
def evaluate(
    model: HybridLM, data: TrainingData, *, tokens: int, rows: int, device: torch.device
) -> dict[str, float]:
    """Return the metrics of all domains; the same rows every time, `rows` of them at once."""
    total = Sums()
    values: dict[str, float] = {}
    for domain in data.validation_domains:
        sums = Sums()
        for portion in data.validation(domain, tokens=tokens, rows=rows):
            batch = portion.batch.to(device)
            seq_idx = batch.seq_idx if data.config.reset_documents else None
            hidden = model(batch.input_ids, seq_idx)
            loss_sum = model.lm_head.loss(hidden, batch.labels)
            sums += Sums(loss_sum.item(), portion.batch.num_loss_tokens, portion.num_bytes)
        values |= sums.metrics(f"validation/{domain}")
        total += sums
    return total.metrics("validation") | values
