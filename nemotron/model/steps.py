"""What may compute the calls that continue texts of a cache, in place of the layers."""

from typing import Any, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from nemotron.model.ahead import RowsAhead
from nemotron.model.cached_rows import CachedRows


class Steps(Protocol):
    """Computes calls that continue the texts of a cache in another way than layer by layer.

    `model` is the `HybridLM` whose call it is.
    """

    record: list[Int[Tensor, "M K"]] | None
    """Gets the experts that every mixture layer chooses; absent: nobody asks."""

    def __call__(
        self,
        model: Any,
        tokens: Int[Tensor, "B T"],
        rows: CachedRows,
        *,
        embedded: Float[Tensor, "B T D"] | None = None,
        only_last: bool = False,
    ) -> Float[Tensor, "B S D"] | None:
        """Return the hidden states after the final norm; None leaves the call to the layers.

        The first layer reads what is `embedded` already in place of the tokens' embeddings.
        """

    def ahead(
        self,
        model: Any,
        tokens: Int[Tensor, "B T"],
        hidden: Float[Tensor, "B T D"],
        rows: RowsAhead,
    ) -> Float[Tensor, "B T D"] | None:
        """As a call, through the multi-token-prediction block."""
