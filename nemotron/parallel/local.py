"""What this process holds of a built model: all of it, or what a layout of ranks gives it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nemotron.data.batch import Batch
from nemotron.model.adapter import Adapter, first_value, is_adapter
from nemotron.model.config import ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.model.init import STACKED, draw, generator
from nemotron.parallel.mesh import Mesh
from nemotron.parallel.shards import Offsets, Shard, local_shards

if TYPE_CHECKING:  # importing these takes seconds, which one process need not spend
    from nemotron.parallel.pipeline import Pipeline
    from nemotron.parallel.whole import WholeMatrices

Read = Callable[[str, torch.Size, range | None], Tensor]
"""Returns a tensor by name and whole shape; of one that stacks experts, those in the range."""


class LocalModel:
    """A model that one process holds; `DistributedModel` is what a rank of several holds."""

    def __init__(self, config: ModelConfig, models: list[HybridLM]) -> None:
        self.config, self.models = config, models
        self.roots: list[nn.Module] = list(models)
        self.shards: dict[str, Shard] = {}
        """Where the split parameters lie in the whole; the others are whole."""
        self.partial: set[str] = set()
        """Parameters of which each rank of `tp` has a part of the gradient only."""
        self.pipeline: Pipeline | None = None
        """What runs the stages, where there are several."""

    @property
    def mesh(self) -> Mesh | None:
        """The groups of this rank, if there are several."""
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their name in the whole model."""
        return {n: p for model in self.models for n, p in model.named_parameters()}

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that name, without a walk over all of them.

        Raises:
            KeyError: when there is none here.
        """
        owner, _, own = name.rpartition(".")
        for model in reversed(self.models):
            found = getattr(_submodule(model, owner), "_parameters", {}).get(own)
            if found is not None:
                return found
        raise KeyError(name)

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers, each of them whole."""
        return {n: b for model in self.models for n, b in model.named_buffers()}

    def module(self, name: str) -> nn.Module | None:
        """Return the module of that name, if it is here."""
        found = (_submodule(model, name) for model in self.models)
        return next((module for module in found if module is not None), None)

    @property
    def batch_rank(self) -> int:
        """Number of this rank among those, or groups of them, that read different rows."""
        return 0

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's sums of losses count: those of a `tp` group are one and the same."""
        return True

    @property
    def counts_rows(self) -> bool:
        """Whether this rank counts its rows: one does of those that share them."""
        return True

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters().values())).device

    def drop_gathered(self) -> None:
        """Forget weights that were gathered to evaluate: they would be stale later."""

    def share_rows(self, batch: Batch) -> Batch:
        """Return this rank's tokens of rows that ranks share."""
        return batch.map(self.share_tokens)

    def share_tokens(self, values: Tensor) -> Tensor:
        """Return what belongs to this rank's tokens, of one tensor [B, T] or [B, T, …]."""
        return values

    def token_numbers(self, first_row: int, rows: int, length: int) -> Int[Tensor, "B T"] | int:
        """Return the numbers in the whole batch of the tokens of some rows, if they are here.

        Where no rank shares a row, that of the first says it all.
        """
        return first_row * length

    def sync_gradients(self, on: bool) -> None:
        """Say whether the next backward pass adds gradients up over ranks."""

    def finish_gradients(self) -> None:
        """Add up what several ranks have of the gradients of tensors that each of them holds."""

    def counts(self, name: str) -> bool:
        """Say whether this rank counts a parameter where each element counts once."""
        return True

    def held(self, tensor: Tensor) -> Tensor:
        """Return what is here of a parameter or gradient, sharing its memory, without gradient."""
        return tensor.detach()

    def sharded(self, name: str, local: Tensor) -> Tensor:
        """Return a tensor of the shape of the local parameter as shards of the whole."""
        return local

    def whole_matrices(self) -> "WholeMatrices | None":
        """Return what gathers matrices over ranks, where they hold shards of them."""
        return None

    def materialize(self, device: torch.device) -> None:
        """Give the tensors memory; what is in it is undefined."""
        for model in self.models:
            # `to_empty` would import a package of symbolic mathematics, which takes a second
            named = model.state_dict()
            empty = {
                n: torch.empty(t.shape, dtype=t.dtype, device=device) for n, t in named.items()
            }
            model.load_state_dict(empty, assign=True)
            if model.config.tie_word_embeddings:
                # materializing gave each of the two names a tensor of its own
                model.lm_head.weight = model.backbone.embeddings.weight

    def init_weights(self, seed: int) -> None:
        """Draw this rank's part of the weights: the same whole tensors in any layout."""
        self.fill(
            lambda name, shape, experts: (
                self.first_value(name, shape, seed)
                if is_adapter(name)
                else draw(name, shape, self.config, seed, experts)
            )
        )

    def first_value(
        self, name: str, shape: torch.Size, seed: int, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return the first value of a tensor of an adapter, on these weights of the whole model."""
        adapter = self.module(name.rpartition(".")[0])
        assert isinstance(adapter, Adapter), name
        return first_value(name, shape, adapter.scale, generator(seed, name), weights)

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Fill parameters and buffers with what is here of the tensors that `read` returns.

        `read` gets name and shape of the whole and, where a tensor stacks experts, the numbers of
        those that are asked for.
        """
        for name, parameter in self.parameters().items():
            whole = self.sharded(name, self.held(parameter))
            for offsets, tensor in local_shards(whole).items():
                _fill_shard(name, whole.shape, offsets, tensor, read)
        for name, buffer in self.buffers().items():
            buffer.copy_(read(name, buffer.shape, None))


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    found: nn.Module | None = model
    for part in name.split("."):
        found = getattr(found, "_modules", {}).get(part)
    return found


def _fill_shard(name: str, shape: torch.Size, at: Offsets, tensor: Tensor, read: Read) -> None:
    box = [slice(low, low + size) for low, size in zip(at, tensor.shape, strict=True)]
    experts = None
    if name.endswith(STACKED):
        experts = range(box[0].start, box[0].stop)
        box[0] = slice(None)
    tensor.copy_(read(name, shape, experts)[tuple(box)])
