"""Adding up the micro-batches of a step: losses as sums, and the load of the experts."""

import torch
from torch import Tensor

from nemotron.train.config import LossConfig
from nemotron.train.loss import LossTerms, TokenCounts, objective


class StepSums:
    """Detached float32 sums over the micro-batches so far, on the device."""

    def __init__(self, num_depths: int, device: torch.device) -> None:
        self.main = torch.zeros((), device=device)
        self.mtp = tuple(torch.zeros((), device=device) for _ in range(num_depths))
        self.aux = torch.zeros((), device=device)
        self.load: dict[str, Tensor] = {}
        """Tokens per expert, by the name of the mixture layer."""

    def add(self, terms: LossTerms) -> None:
        """Add one micro-batch."""
        self.main += terms.main.detach()
        self.aux += terms.aux.detach()
        for total, term in zip(self.mtp, terms.mtp, strict=True):
            total += term.detach()
        for stats in terms.routing:
            known = self.load.get(stats.name)
            self.load[stats.name] = stats.counts if known is None else known + stats.counts

    def objective(self, counts: TokenCounts, config: LossConfig) -> Tensor:
        """Return the loss of the whole step, as it was differentiated."""
        return objective(LossTerms(self.main, self.mtp, self.aux, []), counts, config)

    def values(self, counts: TokenCounts) -> dict[str, float]:
        """Return each term per token; a term without targets is left out."""
        names = ["loss/main", *(f"loss/mtp_{depth}" for depth in range(1, len(self.mtp) + 1))]
        terms = zip(names, (self.main, *self.mtp), (counts.main, *counts.mtp), strict=True)
        values = {name: total.item() / count for name, total, count in terms if count}
        if self.load:
            values["loss/aux"] = self.aux.item() / counts.tokens
        return values
