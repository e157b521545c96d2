"""Adding up the micro-batches of a step, then the ranks: losses as sums, and experts' load."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron.parallel.runtime import Ranks
from nemotron.train.config import LossConfig
from nemotron.train.loss import LossTerms, TokenCounts, objective


class StepSums:
    """Detached sums over the micro-batches so far, on the device."""

    def __init__(
        self, num_depths: int, layers: Sequence[str], num_experts: int, device: torch.device
    ) -> None:
        """Begin at zero; `layers` names the mixture layers of the whole model."""
        self.main = torch.zeros((), device=device)
        self.mtp = tuple(torch.zeros((), device=device) for _ in range(num_depths))
        self.aux = torch.zeros((), device=device)
        load = torch.zeros(len(layers), num_experts, dtype=torch.int64, device=device)
        self.load: dict[str, Tensor] = dict(zip(layers, load, strict=True))
        """Tokens per expert, by the name of the mixture layer."""
        self._all_load = load

    def add(self, terms: LossTerms) -> None:
        """Add one micro-batch."""
        self.main += terms.main.detach()
        self.aux += terms.aux.detach()
        for total, term in zip(self.mtp, terms.mtp, strict=True):
            total += term.detach()
        for stats in terms.routing:
            self.load[stats.name] += stats.counts

    def add_up(self, ranks: Ranks, others: Tensor, *, counts_loss: bool) -> Tensor:
        """Add up over all ranks in one exchange, together with a vector of others.

        `counts_loss` is false on all but one of the ranks that computed the same losses.
        """
        if not ranks.grouped:
            return others
        losses = torch.stack([self.main, *self.mtp])
        losses = losses if counts_loss else torch.zeros_like(losses)
        parts = [losses, self.aux.view(1), others, self._all_load.flatten()]
        total = ranks.sum(torch.cat([part.double() for part in parts]))
        losses, aux, others, load = total.split([part.numel() for part in parts])
        self.main, *mtp = losses.to(self.main.dtype).unbind()
        self.mtp, self.aux = tuple(mtp), aux[0].to(self.aux.dtype)
        self._all_load.copy_(load.view_as(self._all_load))
        return others

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
