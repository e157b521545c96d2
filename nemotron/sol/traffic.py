"""Bytes that tensor operations read and write, one after the other: what fusing them saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Counts for each operation of torch the tensors that it takes and makes; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,  # Any: an overload of torch, and whatever it takes
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        taken = _tensors((args, kwargs))
        made = _tensors(result)
        storages = {t.untyped_storage().data_ptr() for t in taken}
        views = all(t.untyped_storage().data_ptr() in storages for t in made)
        if func._schema.is_mutable or not views:
            self.bytes += sum(map(_distinct_bytes, (*taken, *made)))
        return result


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the traffic of what runs inside, with its gradients."""
    with Traffic() as traffic:
        yield traffic


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _distinct_bytes(tensor: Tensor) -> int:
    """Count what is repeated without a copy once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    count = torch.Size([size for size, stride in sizes if stride]).numel()
    return count * tensor.element_size() if tensor.numel() else 0
