"""Low-rank adapters of linear layers and of stacked experts: LoRA and DoRA.

Sources: Hu et al. 2021, "LoRA"; Liu et al. 2024, "DoRA", with the norm outside of the gradient.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MARK = re.compile(r"(.*)\.((?:up_|down_)?adapter)\.(lora_A|lora_B|magnitude|scaling)")
"""Name of a tensor of an adapter: the module, its adapter, the tensor."""

Tensors = Mapping[str, Tensor]


class WrongAdapter(ValueError):
    """Says in one clause what is wrong with the tensors of an adapter."""


class Adapter(nn.Module):
    """What is added to a matrix: `scale` times the product of two narrow ones.

    With `dora` the rows of the sum get norms of their own. For stacked experts every tensor has
    them as its first dimension. `scaling` keeps the scale in a checkpoint.
    """

    def __init__(self, shape: torch.Size, rank: int, scale: float, *, dora: bool) -> None:
        super().__init__()
        *experts, outputs, inputs = shape
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(*experts, rank, inputs))
        self.lora_B = nn.Parameter(torch.empty(*experts, outputs, rank))
        self.magnitude = nn.Parameter(torch.empty(outputs)) if dora else None
        self.register_buffer("scaling", torch.empty(()))

    def forward(
        self, x: Float[Tensor, "*batch I"], y: Float[Tensor, "*batch O"], weight: Tensor
    ) -> Float[Tensor, "*batch O"]:
        """Return the product of the adapted matrix and `x`; `y` is that of `weight` and `x`."""
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        y = y + self.scale * nn.functional.linear(low, self.lora_B.to(x.dtype))
        if self.magnitude is None:
            return y
        with torch.no_grad():
            norm = _row_norms(weight, self.lora_A, self.lora_B, self.scale)
        return y * (self.magnitude / norm).to(y.dtype)

    def add_grouped(
        self,
        rows: Float[Tensor, "R I"],
        y: Float[Tensor, "R O"],
        counts: Int[Tensor, " E"],
        grouped_linear: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "R O"]:
        """Return the sum for rows that are ordered by expert."""
        low = grouped_linear(rows, self.lora_A.to(rows.dtype), counts)
        return y + self.scale * grouped_linear(low, self.lora_B.to(rows.dtype), counts)


def is_adapter(name: str) -> bool:
    """Say whether a tensor belongs to an adapter."""
    return MARK.fullmatch(name) is not None


def first_value(
    name: str,
    shape: torch.Size,
    scale: float,
    generator: torch.Generator,
    weights: Tensors | None = None,
) -> Tensor:
    """Return the first value of a tensor of an adapter, which then changes nothing.

    `weights` are the base's, of which `magnitude` takes the norms; without them it is 1.
    """
    match = MARK.fullmatch(name)
    assert match is not None, name
    module, _, leaf = match.groups()
    if leaf == "scaling":
        return torch.tensor(scale)
    if leaf == "lora_B":
        return torch.zeros(shape)
    if leaf == "magnitude":
        found = (weights or {}).get(f"{module}.weight")
        return torch.ones(shape) if found is None else found.float().norm(dim=1)
    bound = 1 / math.sqrt(shape[-1])  # Kaiming uniform with a = sqrt(5), as PEFT
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapters_of(source: str) -> str:
    """Return what the names of the tensors begin with that adapt the weight of this name."""
    module, _, leaf = source.rpartition(".")
    return f"{module}.adapter." if leaf == "weight" else f"{module}.{leaf[:-5]}_adapter."


def check_adapter(shape: torch.Size, tensors: Tensors) -> None:
    """Check the tensors of an adapter, by their last names, against the shape of its weight.

    Raises:
        WrongAdapter: when one is absent, or of another shape.
    """
    *experts, outputs, inputs = shape if len(shape) in (2, 3) else (0, 0)
    for name in ("lora_A", "lora_B", "scaling"):
        if name not in tensors:
            raise WrongAdapter(f"an adapter has no {name}")
    rank = tensors["lora_A"].shape[-2] if tensors["lora_A"].ndim == len(shape) else 0
    wanted = {
        "lora_A": (*experts, rank, inputs),
        "lora_B": (*experts, outputs, rank),
        "scaling": (),
        "magnitude": (-1,) if experts else (outputs,),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted[name] or not (rank and tensor.is_floating_point()):
            raise WrongAdapter(
                f"{name} of an adapter of {list(shape)} is {list(tensor.shape)}, not "
                f"{list(wanted[name])}"
            )


def merged(weight: Tensor, tensors: Tensors) -> Tensor:
    """Return a weight with its adapter in it; `tensors` are the adapter's by their last name.

    Raises:
        WrongAdapter: as `check_adapter` does.
    """
    check_adapter(weight.shape, tensors)
    A, B, scale = tensors["lora_A"], tensors["lora_B"], float(tensors["scaling"])
    total = weight + scale * (B @ A)
    if "magnitude" not in tensors:
        return total
    return total * (tensors["magnitude"] / total.norm(dim=1)).unsqueeze(1)


def by_weight(shapes: Mapping[str, torch.Size], tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of all adapters, checked, by the name of the weight that each adapts.

    `shapes` are those of the model; tensors that belong to no adapter are left out.

    Raises:
        WrongAdapter: as `check_adapter` does, and when an adapter adapts nothing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := MARK.fullmatch(name):
            found.setdefault(name.removesuffix(match[3]), {})[match[3]] = tensor
    adapters = {name: found.pop(start) for name in shapes if (start := adapters_of(name)) in found}
    for start in found:
        raise WrongAdapter(f"{start}lora_A adapts no weight of the model")
    for name, own in adapters.items():
        check_adapter(shapes[name], own)
    return adapters


def merge_all(weights: Tensors) -> dict[str, Tensor]:
    """Return the weights of a model, each with its adapter merged into it.

    Raises:
        WrongAdapter: as `by_weight` does.
    """
    plain = {name: tensor for name, tensor in weights.items() if not is_adapter(name)}
    adapters = by_weight({name: tensor.shape for name, tensor in plain.items()}, weights)
    return {
        name: merged(tensor, adapters[name]) if name in adapters else tensor
        for name, tensor in plain.items()
    }


def _row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Float[Tensor, " O"]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (B.to(wide) @ A.to(wide))).norm(dim=1)
