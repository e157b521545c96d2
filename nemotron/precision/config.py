"""Which number format the layers compute in."""

from typing import Literal

from nemotron.section import Section


class PrecisionConfig(Section):
    """Compute precision; the master weights and the optimizer's moments are always float32."""

    compute: Literal["fp32", "bf16"] = "fp32"
    """Format of activations and of the matrix products."""
