"""Results of cheap operations that backward computes again, so that no other operation keeps them.

A recomputed operation notes on the storage of its result how that was made. Inside `saving`, the
note is kept for backward in place of the tensor. The inputs that it names are those which the
operation keeps for its own backward.
Source of the idea: NVIDIA/Megatron-LM: megatron/core/tensor_parallel/random.py
(CheckpointWithoutOutput), which empties the tensor and fills it again by a hook.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Saving = Callable[[], AbstractContextManager[object]]
"""Opens the context of a forward pass that decides what backward keeps."""
keeping_all: Saving = nullcontext


class _Call:
    """How a tensor is made; whoever kept it shares what is made once, while any is left."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...], index: int) -> None:
        self._function, self._inputs, self._index = function, inputs, index
        self._result: Tensor | None = None

    def result(self) -> Tensor:
        """Return the tensor, made when first asked for."""
        if self._result is None:
            # no input asks for a gradient; without one at all, some backends take other ways
            with torch.enable_grad():
                results = self._function(*map(_unpack, self._inputs))
            self._result = results if isinstance(results, Tensor) else results[self._index]
            self._inputs = ()
        return self._result

    def show(self, keep: Callable[[Tensor], Tensor]) -> None:
        """Let `keep` see what the tensor is made of."""
        for value in self._inputs:
            if isinstance(value, Tensor):
                keep(value)
            elif isinstance(value, _View):
                value.call.show(keep)


class _View:
    """A tensor, or a part of one, that is made again."""

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.call = call
        self._layout = tensor.size(), tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        return self.call.result().as_strided(*self._layout)


def call(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call the function of a backend, and note on its results how they were made.

    Nobody may change the results in place.
    """
    results = function(*inputs)
    if not torch.is_grad_enabled():
        return results
    given = {_storage(value)._cdata for value in inputs if isinstance(value, Tensor)}
    packed: tuple[Any, ...] | None = None
    for index, result in enumerate((results,) if isinstance(results, Tensor) else results):
        # where nothing before the result is trained, its inputs are not kept either
        if result.requires_grad and _storage(result)._cdata not in given:
            if packed is None:
                packed = tuple(_pack(v) if isinstance(v, Tensor) else v for v in inputs)
            vars(_storage(result))["made_by"] = _Call(function, packed, index), result.dtype
    return results


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _pack(tensor: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> Any:
    call, dtype = vars(_storage(tensor)).get("made_by", (None, None))
    if call is None or dtype != tensor.dtype:
        # an operation that keeps its own result would keep itself by it
        tensor = tensor.detach()
        return tensor if keep is None else keep(tensor)
    if keep is not None:
        call.show(keep)
    return _View(call, tensor)


def _unpack(kept: Any) -> Any:
    return kept.tensor() if isinstance(kept, _View) else kept


def saving(
    keep: Callable[[Tensor], Tensor] | None = None,
) -> torch.autograd.graph.saved_tensors_hooks:
    """Return a context in which results of recomputed operations are not kept for backward.

    To measure that, `keep` sees all that is kept, the inputs of these operations included.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda t: _pack(t, keep), _unpack)
