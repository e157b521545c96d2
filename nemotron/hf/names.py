"""Names of the parameters in Hugging Face's layout, and where the model keeps each of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nemotron.hf.formats import RELEASED, DiskFormat, DiskTensor, Formats, Shape
from nemotron.model.build import shapes
from nemotron.model.config import ModelConfig
from nemotron.model.init import STACKED


@dataclass(frozen=True)
class DiskParameter:
    """One parameter of an exported folder, with the format in which it lies there.

    `source` is its name in `HybridLM.state_dict()`, `expert` its place in there when the model
    stacks the matrices of all experts of a layer.
    """

    name: str
    shape: Shape
    source: str
    expert: int | None
    format: DiskFormat

    @cached_property
    def tensors(self) -> Sequence[DiskTensor]:
        """The tensors that the parameter becomes."""
        return self.format.tensors(self.name, self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data of all its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    def part_of(self, source: Tensor) -> Tensor:
        """Return the part of the model's tensor that this one holds, as a view."""
        return source if self.expert is None else source[self.expert]

    def encode(self, source: Tensor) -> dict[str, Tensor]:
        """Return its tensors by their names on disk, given the model's float32 tensor."""
        return self.format.encode(self.name, self.part_of(source))

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """Return its values, given its tensors by their names on disk."""
        return self.format.decode(self.name, stored, self.shape)


def disk_parameters(config: ModelConfig, formats: Formats = RELEASED) -> list[DiskParameter]:
    """List every parameter of an exported model, in the order of the files.

    A tied head is listed, so that readers which don't tie find it.
    """
    found = []
    for source, shape in shapes(config).items():
        for name, expert in _disk_names(source, shape):
            own = tuple(shape if expert is None else shape[1:])
            found.append(DiskParameter(name, own, source, expert, formats.of(name, own)))
    return found


def count_parameters(config: ModelConfig) -> int:
    """Return the number of `disk_parameters`, without listing them."""
    return sum(
        shape[0] if source.endswith(STACKED) else 1 for source, shape in shapes(config).items()
    )


def disk_tensors(parameters: Sequence[DiskParameter]) -> list[DiskTensor]:
    """Return the tensors of the parameters, in their order."""
    return [tensor for parameter in parameters for tensor in parameter.tensors]


def _disk_names(source: str, shape: torch.Size) -> list[tuple[str, int | None]]:
    """Return the names on disk of a tensor of the model, each with the expert that it is."""
    if not source.endswith(STACKED):
        return [(source, None)]
    layer, _, projection = source.rpartition(".")
    return [(f"{layer}.{expert}.{projection}.weight", expert) for expert in range(shape[0])]
