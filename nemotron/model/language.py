"""Experts by language: a gate that all mixture layers share, and linear experts before the head."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from nemotron.model.config import LanguageExpertsConfig
from nemotron.model.router import GroupChoice, RoutingStats
from nemotron.ops.linear import wide_linear

UNKNOWN = -1
"""Label of a token whose language is not known."""


@dataclass(frozen=True)
class Languages:
    """What is known of the language of each token, and whether it decides."""

    labels: Int[Tensor, "B T"]
    """Of whole rows; `UNKNOWN` where it is not known."""
    decide: bool = False
    """Whether labels choose the experts in place of the gate."""


class LanguageExperts(nn.Module):
    """A softmax gate over languages, each of which has a group of the routed experts.

    The gate reads the residual stream before the first mixture layer. Linear experts add to the
    last hidden state what a matrix of each language makes of it, weighted by the gate; they begin
    at zero.
    Source: Gated Language Experts and Curriculum Training (arXiv 2303.00786), whose formulas are
    not public.
    """

    own_tokens: Callable[[Shaped[Tensor, "B T"]], Shaped[Tensor, "B Tl"]] | None
    """Picks what this rank computes of values over a row's tokens; absent: all of them."""
    fixed: int | None
    """Language that chooses the experts of all tokens in place of the gate; absent: none does."""

    def __init__(self, config: LanguageExpertsConfig, hidden_size: int, first_layer: int) -> None:
        """Make a gate that reads what `first_layer`, the first mixture layer, reads."""
        super().__init__()
        self.first_layer = first_layer
        count = len(config.languages)
        self.soft, self.own_tokens = config.soft, None
        self.names = config.languages
        self.fixed: int | None = None
        self.wide_linear = wide_linear
        self.gate = nn.Parameter(torch.empty(count, hidden_size))
        self.linear: nn.Parameter | None = None
        if config.linear:
            self.linear = nn.Parameter(torch.empty(count, hidden_size, hidden_size))

    def choose(
        self,
        hidden: Float[Tensor, "B T D"],
        known: Languages | None = None,
        padding: Bool[Tensor, "B S"] | None = None,
    ) -> tuple[GroupChoice, Float[Tensor, ""] | None]:
        """Return the language of each token, and the gate's loss where something is known.

        The loss is its cross entropy, summed over the tokens whose language is known.
        """
        flat = hidden.flatten(0, 1)
        # a gate that does not depend on how large the residual stream grows
        logits = self.wide_linear(F.rms_norm(flat, flat.shape[1:]), self.gate)
        if self.fixed is not None:
            everywhere = torch.full((len(flat),), self.fixed, device=flat.device)
            return self.choice(logits, everywhere), None
        if known is None:
            return self.choice(logits), None
        labels = known.labels if padding is None else known.labels.masked_fill(padding, UNKNOWN)
        labels = (labels if self.own_tokens is None else self.own_tokens(labels)).flatten()
        loss = F.cross_entropy(logits, labels, ignore_index=UNKNOWN, reduction="sum")
        return self.choice(logits, labels if known.decide else None), loss

    def choice(
        self, logits: Float[Tensor, "M G"], labels: Int[Tensor, " M"] | None = None
    ) -> GroupChoice:
        """Return the likeliest language, or that of a label where there is one."""
        shares = logits.softmax(-1)
        group = logits.argmax(-1)
        if labels is not None:
            is_known = labels != UNKNOWN
            group = torch.where(is_known, labels, group)
            one_hot = F.one_hot(group, shares.shape[1]).to(shares.dtype)
            shares = torch.where(is_known.unsqueeze(1), one_hot, shares)
        factor = shares.gather(1, group.unsqueeze(1)) if self.soft else None
        return GroupChoice(group, factor, shares)

    def add_linear(
        self, hidden: Float[Tensor, "B T D"], choice: GroupChoice
    ) -> Float[Tensor, "B T D"]:
        """Return h + Σ p_l A_l h; h itself without linear experts."""
        if self.linear is None:
            return hidden
        shares = choice.shares.view(*hidden.shape[:2], -1).to(hidden.dtype)
        added = [
            share.unsqueeze(-1) * F.linear(hidden, matrix.to(hidden.dtype))
            for share, matrix in zip(shares.unbind(-1), self.linear.unbind(), strict=True)
        ]
        return hidden + torch.stack(added).sum(0)


class GatePass:
    """One forward pass as the gate sees it: the choice that all mixture layers share, its loss."""

    def __init__(
        self,
        experts: LanguageExperts,
        known: Languages | None,
        padding: Bool[Tensor, "B S"] | None,
    ) -> None:
        self._experts, self._known, self._padding = experts, known, padding
        self._choice: GroupChoice | None = None
        self._loss: Float[Tensor, ""] | None = None

    def before(self, layer: int, hidden: Float[Tensor, "B T D"]) -> GroupChoice | None:
        """Return the choice for a layer, which is made before the first mixture layer."""
        if layer == self._experts.first_layer:
            self._choice, self._loss = self._experts.choose(hidden, self._known, self._padding)
        return self._choice

    def after(
        self, hidden: Float[Tensor, "B T D"], routing: list[RoutingStats] | None
    ) -> Float[Tensor, "B T D"]:
        """Return the last hidden states with the linear experts' part.

        The statistics of the first mixture layer get the gate's loss.
        """
        first = f"backbone.layers.{self._experts.first_layer}"
        if routing is not None:
            place = [stats.name for stats in routing].index(first)
            routing[place] = replace(routing[place], language_loss_sum=self._loss)
        assert self._choice is not None, "the pattern has a mixture layer"
        return self._experts.add_linear(hidden, self._choice)
