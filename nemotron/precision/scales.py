"""What post-training quantization decides about one linear layer, apart from its weights."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

StoredFormat = Literal["fp8", "nvfp4"]
"""E4M3 with one scale for a tensor; or E2M1 with a scale for 16 neighbours of a row."""


@dataclass(frozen=True)
class LinearScales:
    """The format of a linear layer and its fixed scales, as ModelOpt's exports store them.

    A weight is `nibble * weight_scale * weight_scale_2` in NVFP4, `value * weight_scale` in FP8.
    Source: modelopt/torch/export/unified_export_hf.py of NVIDIA/Model-Optimizer.
    """

    format: StoredFormat
    weight_scale: Tensor
    """FP8: float32 scalar, largest magnitude / 448. NVFP4: E4M3 [out, in / 16]."""
    weight_scale_2: Tensor | None = None
    """NVFP4 alone: float32 scalar, largest magnitude / (448 * 6)."""
    input_scale: Tensor | None = None
    """float32 scalar, of the largest input / 448 (FP8) or / (448 * 6); None: weights alone."""
