"""What a block really keeps for backward: one of each kind, run with tensors that hold no data."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron.model.block import Block
from nemotron.model.config import ModelConfig
from nemotron.ops.apply import apply
from nemotron.ops.apply import recompute as apply_recompute
from nemotron.ops.config import OpsConfig, Recomputed
from nemotron.ops.recompute import saving
from nemotron.plan.memory import activation_bytes, result_bytes

TOKENS = 512
"""Length of the row; a second length is traced to find what grows with the tokens."""
CPU_OPERATIONS = OpsConfig(
    attention="sdpa", grouped_linear="loop", linear="reference", ssd="chunked"
)


@dataclass(frozen=True)
class Kept:
    """Bytes that a block of a kind keeps for each token: as computed, and as traced."""

    letter: str
    formula: float
    traced: float

    @property
    def error(self) -> float:
        """The formula's error relative to the trace."""
        return self.formula / self.traced - 1


def trace_blocks(
    model: ModelConfig, width: int = 2, recompute: Collection[Recomputed] = ()
) -> list[Kept]:
    """Trace a block of each kind that the pattern has, at its real size, and compare.

    The operations are those for CPUs that multiply `width`, so that this one changes nothing; their
    scan keeps the states between its chunks. The formula is for the same. `width` is that of an
    activation: 2 for bf16, 4 for fp32. Results of operations are recomputed as named.
    """
    found = []
    for letter in sorted(set(model.hybrid_override_pattern)):
        once, twice = (_kept(model, letter, n * TOKENS, width, recompute) for n in (1, 2))
        formula = activation_bytes(model, letter, scan="chunked", width=width)
        formula -= result_bytes(model, letter, recompute, width=width)
        found.append(Kept(letter, formula, (twice - once) / TOKENS))
    return found


def _kept(
    model: ModelConfig, letter: str, tokens: int, width: int, recompute: Collection[Recomputed]
) -> int:
    """Return the bytes that one call of a block saves, each storage once, parameters left out."""
    dtype = torch.bfloat16 if width == 2 else torch.float32
    storages: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[_address(tensor)] = tensor
        return tensor

    copies = tokens * model.num_experts_per_tok
    with FakeTensorMode(), _EvenRouting(copies, model.n_routed_experts):
        block = Block(model, letter)
        apply(block, CPU_OPERATIONS)
        apply_recompute(block, recompute)
        own = {_address(t) for t in (*block.parameters(), *block.buffers())}
        hidden = torch.empty(1, tokens, model.hidden_size, dtype=dtype, requires_grad=True)
        with saving(keep):
            block(hidden)
        return sum(
            tensor.untyped_storage().nbytes()
            for number, tensor in storages.items()
            if number not in own
        )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _EvenRouting(TorchDispatchMode):
    """Answers what only data could: each expert gets the same number of copies."""

    def __init__(self, copies: int, experts: int) -> None:
        super().__init__()
        self._copies, self._experts = copies, experts
        self._totals: list[Tensor] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # Any: whatever the operation returns
        kwargs = kwargs or {}
        if func is torch.ops.aten.bincount.default:
            length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
            return args[0].new_empty(length)
        if func is torch.ops.aten._local_scalar_dense.default:
            is_total = any(args[0] is total for total in self._totals)
            return self._copies if is_total else self._copies // self._experts
        result = func(*args, **kwargs)
        if func is torch.ops.aten.sum.default and not result.is_floating_point():
            self._totals.append(result)
        return result
