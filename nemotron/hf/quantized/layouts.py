"""The two layouts of quantized models that inference engines read: names of tensors in each.

Sources: NVIDIA/Model-Optimizer: modelopt/torch/export/unified_export_hf.py;
vllm-project/compressed-tensors: compressors/nvfp4/base.py, compressors/naive_quantized/base.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemotron.hf.formats import Shape
from nemotron.precision.formats import decode_fp8
from nemotron.precision.scales import LinearScales, StoredFormat

LayoutName = Literal["modelopt", "compressed-tensors"]
"""ModelOpt's unified layout, or that of llm-compressor."""

FORMAT_NAMES: dict[StoredFormat, str] = {"fp8": "FP8", "nvfp4": "NVFP4"}
"""What messages, the model card and ModelOpt's files call the formats."""


@dataclass(frozen=True)
class Layout:
    """How a layout calls the tensors of a layer, after the layer's name and a dot."""

    name: LayoutName
    codes: Mapping[StoredFormat, str]
    outer: str
    """NVFP4's scale of the tensor, or its reciprocal."""
    inputs: Mapping[StoredFormat, str]
    is_reciprocal: bool
    """Whether NVFP4's float32 scales are stored as their reciprocals."""
    scalar: Shape
    """Shape of a scale of the whole tensor."""

    def constants(self, scales: LinearScales) -> dict[str, Tensor]:
        """Return the tensors beside the codes, as they are stored."""
        nvfp4 = scales.format == "nvfp4"
        stored = {
            "weight_scale": scales.weight_scale if nvfp4 else self._scalar(scales.weight_scale)
        }
        if nvfp4:
            assert scales.weight_scale_2 is not None, "NVFP4 has a scale of the tensor"
            stored[self.outer] = self._outer(scales.weight_scale_2)
        if scales.input_scale is not None:
            outer = self._outer if nvfp4 else self._scalar
            stored[self.inputs[scales.format]] = outer(scales.input_scale)
        return stored

    def factors(self, format: StoredFormat, constants: Mapping[str, Tensor]) -> Tensor:
        """Return what elements are multiplied by: for all, for each row, or for each block."""
        if format == "fp8":
            scale = constants["weight_scale"].float()
            return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
        blocks, outer = decode_fp8(constants["weight_scale"]), constants[self.outer].float()
        return blocks / outer.reshape(()) if self.is_reciprocal else blocks * outer.reshape(())

    def _outer(self, scale: Tensor) -> Tensor:
        return self._scalar(scale.float().reciprocal() if self.is_reciprocal else scale)

    def _scalar(self, scale: Tensor) -> Tensor:
        return scale.to(torch.float32).reshape(self.scalar).clone()


MODELOPT = Layout(
    name="modelopt",
    codes={"fp8": "weight", "nvfp4": "weight"},
    outer="weight_scale_2",
    inputs={"fp8": "input_scale", "nvfp4": "input_scale"},
    is_reciprocal=False,
    scalar=(),
)
COMPRESSED_TENSORS = Layout(
    name="compressed-tensors",
    codes={"fp8": "weight", "nvfp4": "weight_packed"},
    outer="weight_global_scale",
    inputs={"fp8": "input_scale", "nvfp4": "input_global_scale"},
    is_reciprocal=True,
    scalar=(1,),  # its readers compute in bfloat16 where it has no dimension
)
LAYOUTS = {layout.name: layout for layout in (MODELOPT, COMPRESSED_TENSORS)}
