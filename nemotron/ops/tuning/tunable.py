"""A launch whose parameters are looked up in the tuning base, once per bucket of shapes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nemotron.ops.tuning import base

Configuration = Mapping[str, int]


class Tunable:
    """The parameters of a launch: their defaults, what may be tried, and what they depend on.

    A module of kernels has one for each launch and asks it before it launches. The answer is the
    entry of the tuning base for that bucket of shapes, else the nearest one, else the default.
    """

    def __init__(
        self,
        operation: str,
        launch: str,
        kernels: Sequence[Any],  # Any: a kernel is compiled or interpreted
        axes: Sequence[str],
        default: Configuration,
        space: Mapping[str, Sequence[int]],
        *,
        by_dtype: Mapping[torch.dtype, Configuration] | None = None,
        reorders: Sequence[str] = (),
    ) -> None:
        self.operation, self.launch = operation, launch
        self.kernels = tuple(kernels)
        """Those whose time counts; more than one where a parameter is several kernels'."""
        self.axes = tuple(axes)
        self.space = space
        self.reorders = frozenset(reorders)
        """Parameters that change in which order float32 numbers are added; others change no bit."""
        self._default, self._by_dtype = default, by_dtype or {}
        self._found: dict[tuple[Any, ...], Configuration] = _Found(self._find)

    @property
    def name(self) -> str:
        """Operation and launch."""
        return f"{self.operation} {self.launch}"

    def default(self, dtype: torch.dtype) -> Configuration:
        """Return what is launched without a tuning base."""
        return self._by_dtype.get(dtype, self._default)

    def at(self, x: Tensor, *sizes: int) -> Configuration:
        """Return the parameters for a tensor's device and dtype, and the sizes of the axes."""
        return self._found[(x.device, x.dtype, *[(size - 1).bit_length() for size in sizes])]

    def accepts(self, configuration: Configuration) -> bool:
        """Say whether the kernel, as it is now, has these parameters and values."""
        return configuration.keys() == self.space.keys() and all(
            value in self.space[name] for name, value in configuration.items()
        )

    @contextmanager
    def forced(self, configuration: Configuration) -> Iterator[list[tuple[Any, ...]]]:
        """Launch with this, whatever the shape: to try it, or to test; yields what is asked for.

        That is a list of each device, dtype and buckets.
        """
        asked: list[tuple[Any, ...]] = []

        def answer(*key: Any) -> Configuration:
            asked.append(key)
            return configuration

        kept = self._found
        self._found = _Found(answer)
        try:
            yield asked
        finally:
            self._found = kept

    def _find(self, device: torch.device, dtype: torch.dtype, *buckets: int) -> Configuration:
        if (architecture := base.architecture_of(device)) is not None:
            key = (self.operation, self.launch, name_of(dtype))
            place = dict(zip(self.axes, buckets, strict=True))
            for _, configuration in base.nearest(architecture, key, place):
                if self.accepts(configuration):
                    return configuration
        return self.default(dtype)


class _Found(dict[tuple[Any, ...], Configuration]):
    """What was looked up; each time anew on devices that are no GPU."""

    def __init__(self, find: Callable[..., Configuration]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: tuple[Any, ...]) -> Configuration:
        found = self._find(*key)
        if key[0].type == "cuda":
            self[key] = found
        return found


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as files have it."""
    return str(dtype).removeprefix("torch.")
