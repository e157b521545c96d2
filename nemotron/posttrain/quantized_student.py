"""The fixed scales of a student that learns to compute as a quantized model."""

from pathlib import Path

from nemotron.errors import UserError
from nemotron.hf.folder import is_exported
from nemotron.hf.read_scales import read_scales
from nemotron.model.build import build_on_meta
from nemotron.posttrain.sft_config import DistillConfig
from nemotron.precision.static import ModelScales, lacking

KEY = "quantization.like"


def student_scales(config: DistillConfig) -> ModelScales:
    """Return the scales of the folder that the recipe names.

    Raises:
        UserError: when it is no quantized folder, or one of another model.
    """
    assert config.quantization is not None
    folder = Path(config.quantization.like)
    scales = read_scales(folder) if is_exported(folder) else None
    if scales is None:
        raise UserError(
            "is no folder of a quantized model; write one with nemotron quantize.",
            key=KEY,
            value=str(folder),
        )
    if name := lacking(build_on_meta(config.model), scales):
        raise UserError(
            f"has scales of {name}, which do not fit the model of this recipe; quantize the model "
            "that init_from names.",
            key=KEY,
            value=str(folder),
        )
    return scales
