"""Names, shapes and dtypes of the tensors on disk, and where the model keeps each of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron.hf.build import shapes
from nemotron.model.config import ModelConfig

STACKED = (".experts.up_proj", ".experts.down_proj")
"""Parameters that hold all experts of a layer; on disk each expert has a matrix of its own."""

MAMBA_VECTORS = (".A_log", ".D", ".dt_bias")
"""Per-head vectors of the Mamba-2 mixer; released checkpoints round them to bfloat16."""


@dataclass(frozen=True)
class DiskTensor:
    """One tensor of an exported folder.

    `source` is its name in `HybridLM.state_dict()`, `expert` its place in there when the parameter
    stacks all experts of a layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    expert: int | None

    @property
    def num_bytes(self) -> int:
        """Size of the data in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def part_of(self, source: Tensor) -> Tensor:
        """Return the part of the model's tensor that this one holds, as a view."""
        return source if self.expert is None else source[self.expert]

    def export(self, source: Tensor) -> Tensor:
        """Return what belongs on disk, given the model's float32 tensor."""
        return self.part_of(source).to(self.dtype).contiguous()


def disk_tensors(config: ModelConfig, *, mamba_fp32: bool = False) -> list[DiskTensor]:
    """List every tensor of an exported model, in the order of the files.

    All are bfloat16 except the router's correction bias; `mamba_fp32` keeps A_log, D and dt_bias
    in float32 too. A tied head is listed, so that readers which don't tie find it.
    Source: byte counts of the released Super and Ultra checkpoints.
    """
    wide = ("e_score_correction_bias", *(MAMBA_VECTORS if mamba_fp32 else ()))
    tensors = []
    for source, shape in shapes(config).items():
        dtype = torch.float32 if source.endswith(wide) else torch.bfloat16
        if source.endswith(STACKED):
            layer, _, projection = source.rpartition(".")
            tensors += [
                DiskTensor(
                    f"{layer}.{expert}.{projection}.weight",
                    tuple(shape[1:]),
                    dtype,
                    source,
                    expert,
                )
                for expert in range(shape[0])
            ]
        else:
            tensors.append(DiskTensor(source, tuple(shape), dtype, source, None))
    return tensors
