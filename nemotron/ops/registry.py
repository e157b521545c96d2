"""Choosing an implementation: each operation lists its backends from fastest to slowest."""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from nemotron.errors import UserError
from nemotron.ops import recompute


@dataclass(frozen=True)
class Call:
    """What a backend must be fit for: where the tensors are and which features they ask for."""

    device: str
    dtype: torch.dtype
    needs: frozenset[str] = frozenset()
    sizes: tuple[int, ...] = field(default=(), kw_only=True)
    """Sizes that some backends limit, in an order of each operation's own; empty: not known yet."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation.

    `features` names what it honors beyond the plain call (`documents`, `initial_state`,
    `final_state`, `cache`, ...); a call that needs a feature outside this set makes it unfit.
    """

    name: str
    function: Callable[..., Any]
    devices: frozenset[str] = frozenset({"cpu", "cuda"})
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16, torch.float64})
    features: frozenset[str] = frozenset()
    packages: tuple[str, ...] = ()
    install: str = ""
    imports: tuple[str, ...] = ()
    """Modules that the function imports; a package may be installed and still fail to import."""
    by_name: bool = False
    """Whether it is used only where a recipe names it: its results have other bits than those of
    the backend that existing runs use, and which package is installed must not change a run; or it
    was tested in an interpreter and has not run on its device yet; or this machine has faster."""
    limit: Callable[..., str | None] | None = None
    """Takes the sizes of a call and says why the function cannot compute it, or returns None."""

    def missing(self) -> str | None:
        """Say which package is not installed or cannot be imported, or return None."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"package {package} is not installed ({self.install})"
        for module in self.imports:
            if reason := _import_error(module):
                return f"{module} cannot be imported ({reason})"
        return None

    def is_for(self, call: Call) -> bool:
        """Say whether the backend is for tensors of this kind, installed or not."""
        return call.device in self.devices and call.dtype in self.dtypes

    def unfit(self, call: Call) -> str | None:
        """Say why this backend cannot take the call, or return None when it can."""
        if call.device not in self.devices:
            return f"runs on {' or '.join(sorted(self.devices))}, not on {call.device}"
        if call.dtype not in self.dtypes:
            return f"does not take {str(call.dtype).removeprefix('torch.')}"
        if lacking := call.needs - self.features:
            return f"does not honor {', '.join(sorted(lacking))}"
        if self.limit is not None and call.sizes and (reason := self.limit(*call.sizes)):
            return reason
        return self.missing()


@functools.cache
def _import_error(module: str) -> str | None:
    """Say which package keeps a module from being imported; a fault of our own is raised."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").split(".")[0] == "nemotron":
            raise
        return str(error)
    return None


def lazy(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports `module` when it is first called and runs `name` from it.

    For modules that import an optional package.
    """

    def call(*arguments: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arguments, **keywords)

    return call


def triton_backend(
    module: str,
    function: str,
    *,
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16}),
    features: frozenset[str] = frozenset(),
    by_name: bool = False,
    limit: Callable[..., str | None] | None = None,
) -> Backend:
    """Return the backend `triton` of a GPU, of which a module holds the kernels."""
    return Backend(
        "triton",
        lazy(module, function),
        devices=frozenset({"cuda"}),
        dtypes=dtypes,
        features=features,
        packages=("triton",),
        install="comes with torch for CUDA",
        imports=(module,),
        by_name=by_name,
        limit=limit,
    )


NUMBA = "numba"
"""The backend of kernels for CPUs."""


def numba_backend(
    module: str,
    function: str,
    *,
    name: str = NUMBA,
    dtypes: frozenset[torch.dtype] = frozenset({torch.float32, torch.bfloat16}),
    features: frozenset[str] = frozenset(),
    limit: Callable[..., str | None] | None = None,
) -> Backend:
    """Return a backend of a CPU, of which a module holds the kernels; by name alone."""
    return Backend(
        name,
        lazy(module, function),
        devices=frozenset({"cpu"}),
        dtypes=dtypes,
        features=features,
        packages=("numba",),
        install="pip install numba",
        imports=("nemotron.ops.jit.vectors",),
        by_name=True,
        limit=limit,
    )


INT16 = "numba_int16"
"""The backend of products of bfloat16 in 16-bit integers."""


def int16_backend(module: str, function: str, *, features: frozenset[str] = frozenset()) -> Backend:
    """Return the backend of a CPU that multiplies bfloat16 rows in 16-bit integers."""
    dtypes = frozenset({torch.bfloat16})
    return numba_backend(module, function, name=INT16, dtypes=dtypes, features=features)


@dataclass(eq=False)
class Operation:
    """An operation and its backends, fastest first; the last one fits every call.

    A subclass has the call. Modules hold the operations that they use as attributes, so that
    `ops.apply` can put one that is bound to a backend in the place of each.
    """

    name: str
    backends: Sequence[Backend]
    pinned: str | None = None
    """The backend to use for every call; absent: the first that is fit for it."""
    dtype: torch.dtype | None = None
    """What training calls it in, whatever the format of activations; absent: in that format."""
    recomputed: bool = False
    """Whether backward computes results again that would be kept (`nemotron.ops.recompute`)."""
    _chosen: dict[tuple[Any, ...], Callable[..., Any]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __deepcopy__(self, memo: object) -> "Operation":
        return self  # nothing in it depends on the model that holds it

    def backend(self, name: str) -> Backend:
        """Return the backend of that name.

        Raises:
            UserError: when there is none, naming those that exist.
        """
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(backend.name for backend in self.backends)
        rule = f"is unknown; use auto or one of {known}."
        raise UserError(rule, key=f"ops.{self.name}", value=name)

    def bind(self, name: str) -> Self:
        """Return the operation with the named backend, or with the fittest one for `auto`.

        Raises:
            UserError: when the backend is unknown or its package is missing.
        """
        if name == "auto":
            return replace(self, pinned=None)
        if reason := self.backend(name).missing():
            rule = f"cannot be used: {reason}; or remove the key."
            raise UserError(rule, key=f"ops.{self.name}", value=name)
        return replace(self, pinned=name)

    def choose(self, call: Call) -> Backend:
        """Return the backend that takes this call.

        Raises:
            UserError: when a pinned backend cannot take it.
        """
        if self.pinned is not None:
            backend = self.backend(self.pinned)
            if reason := backend.unfit(call):
                fit = ", ".join(b.name for b in self.backends if b.unfit(call) is None)
                rule = f"{reason}; use one of {fit}, or remove the key."
                raise UserError(rule, key=f"ops.{self.name}", value=self.pinned)
            return backend
        for backend in self.backends:
            if not backend.by_name and backend.unfit(call) is None:
                return backend
        raise UserError(f"no backend of {self.name} takes {call}.")

    def select(
        self, x: torch.Tensor, sizes: tuple[int, ...] = (), **needs: bool
    ) -> Callable[..., Any]:
        """Return the function for tensors like `x`; each true keyword is a needed feature."""
        function = self.fittest(x, sizes, **needs)
        return functools.partial(recompute.call, function) if self.recomputed else function

    def fittest(
        self, x: torch.Tensor, sizes: tuple[int, ...] = (), **needs: bool
    ) -> Callable[..., Any]:
        """Return the function of the backend, for results that are kept where they are needed."""
        key = (x.device, x.dtype, sizes, *needs.items())
        function = self._chosen.get(key)
        if function is None:
            needed = frozenset(name for name, on in needs.items() if on)
            call = Call(x.device.type, x.dtype, needed, sizes=sizes)
            function = self._chosen[key] = self.choose(call).function
        return function

    def takes(self, x: torch.Tensor, sizes: tuple[int, ...] = (), **needs: bool) -> bool:
        """Say whether a backend other than the reference would take tensors like `x`.

        For operations that layers call in place of their own code where that is faster. Sizes that
        a named backend does not take are left to the layers.

        Raises:
            UserError: when a named backend cannot take the call for another reason.
        """
        limit = None if self.pinned is None else self.backend(self.pinned).limit
        if limit is not None and sizes and limit(*sizes):
            return False
        return self.fittest(x, sizes, **needs) is not self.backends[-1].function
