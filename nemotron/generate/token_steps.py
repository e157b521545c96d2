"""Steps of few tokens as one operation: the layers of a prepared model, and the rows of a cache."""

import functools
import logging
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron.generate.graphs import FixedRows
from nemotron.generate.stacks import stack_ahead, stack_of
from nemotron.model.adapter import Adapter
from nemotron.model.ahead import SKIPPED, RowsAhead
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.model.state import KeyValues, MambaSlots, MambaState
from nemotron.ops.registry import INT16, NUMBA, Call, Operation
from nemotron.ops.token_step import TokenStepOp
from nemotron.ops.token_step.stack import KeysPlace, MambaPlace, Stack, Step
from nemotron.precision.static import is_attached

log = logging.getLogger(__name__)

MOST_TOKENS = 2048
"""In one call; beyond, layers one by one take less time."""


class TokenSteps:
    """Passes the tokens of a call through all layers of a prepared model, where it can.

    The weights are those of the first call.
    """

    def __init__(self) -> None:
        self._stack: Stack | None = None
        self._stack_ahead: Stack | None = None
        self.record: list[Int[Tensor, "M K"]] | None = None
        """Gets the chosen experts of every mixture layer, if it is there."""

    def __call__(
        self,
        model: HybridLM,
        tokens: Int[Tensor, "B T"],
        rows: CachedRows,
        *,
        embedded: Float[Tensor, "B T D"] | None = None,
        only_last: bool = False,
    ) -> Float[Tensor, "B S D"] | None:
        """Return the hidden states; None for a call that the layers themselves must compute.

        The first layer reads what is `embedded` already in place of the tokens' embeddings.
        """
        dtype = model.compute_dtype or torch.float32
        if not _suits(rows, tokens, dtype):
            return None
        if self._stack is None:
            self._stack = stack_of(model, dtype)
        step, stack = _step_of(rows, tokens), self._stack
        step.has_experts, step.only_last = self.record is not None, only_last
        step.hidden = embedded
        hidden = model.token_step(stack, step)
        if self.record is not None:
            self.record += step.chosen
        if step.keeps_inputs:
            rows.advance = lambda counts: model.token_step.advance(stack, step, counts)
        rows.end(tokens.shape[1])
        return hidden

    def ahead(
        self,
        model: HybridLM,
        tokens: Int[Tensor, "B T"],
        hidden: Float[Tensor, "B T D"],
        rows: RowsAhead,
    ) -> Float[Tensor, "B T D"] | None:
        """As a call, through the multi-token-prediction block, which joins the hidden states."""
        dtype = model.compute_dtype or torch.float32
        if not _suits(rows, tokens, dtype):
            return None
        if self._stack_ahead is None:
            self._stack_ahead = stack_ahead(model, dtype)
        assert rows.cache.ahead is not None, "the cache has no place for drafts"
        step = Step(
            tokens.contiguous(),
            torch.tensor(rows.slots),
            torch.tensor(rows.firsts),
            # before the places: memory for more blocks is allocated anew
            _tables(rows.cache, rows.slots, rows.firsts, tokens.shape[1]),
            _places_of(rows.cache.ahead.layers),
            hidden=hidden,
            skipped=SKIPPED,
        )
        found = model.token_step(self._stack_ahead, step)
        rows.end(tokens.shape[1])
        return found


def operation_of(model: HybridLM, dtype: torch.dtype) -> TokenStepOp | None:
    """Return the operation for steps of a model whose weights are prepared for it.

    None where the layers themselves take the operation's place, as they do when the recipe names a
    backend of an operation inside them.

    Raises:
        UserError: when the recipe names a backend that cannot take the model.
    """
    config, modules = model.config, list(model.modules())
    needs = {
        "adapters": any(isinstance(module, Adapter) for module in modules),
        "fixed_scales": any(map(is_attached, modules)),
        "language_experts": model.language is not None,
        "groups_of_experts": config.n_group > 1,
    }
    operation = model.token_step
    assert isinstance(operation, TokenStepOp), operation
    device = model.backbone.embeddings.weight.device.type
    named = _named_inside(model.backbone, operation)
    if named is not None and operation.pinned is None:
        if device == "cpu":
            _say(f"layers decode one by one, because {named} is named")
        return None
    needed = frozenset(name for name, is_needed in needs.items() if is_needed)
    call = Call(device, dtype, needed)
    chosen = operation.choose(call)
    if chosen.name != "reference":
        return operation
    if operation.pinned is None and device == "cpu":
        for backend in operation.backends[:-1]:
            _say(f"{backend.name} is not used to decode: {backend.unfit(call)}")
    return None


def _named_inside(layers: nn.Module, step: TokenStepOp) -> str | None:
    """Return a backend that is named of an operation in the layers, other than kernels for CPUs.

    Those are what the steps are made of, too.
    """
    # not that of the head's loss, which no step computes
    for module in layers.modules():
        for value in vars(module).values():
            if not isinstance(value, Operation) or value is step:
                continue
            if value.pinned not in (None, NUMBA, INT16):
                return f"ops.{value.name} = {value.pinned}"
    return None


@functools.cache
def _say(fact: str) -> None:
    log.warning("%s", fact)


def _suits(rows: CachedRows | RowsAhead, tokens: Int[Tensor, "B T"], dtype: torch.dtype) -> bool:
    """Say whether the cache holds float32 states and the model's keys and values, unrounded."""
    if tokens.numel() > MOST_TOKENS or torch.is_grad_enabled() or rows.cache.replays:
        return False
    if isinstance(rows, FixedRows):  # their numbers are read on the device
        return False
    formats = rows.cache.formats
    if formats.state != "fp32" or formats.keys_values_dtype(dtype) != dtype:
        return False
    return all(la.history is None for la in rows.layers if isinstance(la, MambaState))


def _step_of(rows: CachedRows, tokens: Int[Tensor, "B T"]) -> Step:
    """Take the blocks that the tokens need, and return where everything is stored."""
    before = [rows.cache.lengths[slot] for slot in rows.slots]
    return Step(
        tokens.contiguous(),
        torch.tensor(rows.slots),
        torch.tensor(before),
        # before the places: memory for more blocks is allocated anew
        _tables(rows.cache, rows.slots, before, tokens.shape[1]),
        _places_of(rows.cache.layers),
        any(la.keeps_inputs for la in rows.layers if isinstance(la, MambaState)),
    )


def _tables(
    cache: Cache, slots: Sequence[int], before: Sequence[int], length: int
) -> Int[Tensor, "B blocks"]:
    """Return the blocks of each text, those that `length` more tokens need among them."""
    if cache.pools:
        for slot, first in zip(slots, before, strict=True):
            cache.extend(slot, first + length)
    tables = [cache.tables[slot] for slot in slots]
    longest = max(1, *map(len, tables))
    return torch.tensor([table + [0] * (longest - len(table)) for table in tables])


def _places_of(
    layers: Sequence[MambaSlots | KeyValues | None],
) -> tuple[MambaPlace | KeysPlace | None, ...]:
    places: list[MambaPlace | KeysPlace | None] = []
    for layer in layers:
        if isinstance(layer, MambaSlots):
            places.append(MambaPlace(layer.conv, layer.ssm))
        else:
            places.append(None if layer is None else KeysPlace(layer.keys, layer.values))
    return tuple(places)
