"""The fixed scales of a quantized folder, in either layout, for a model that computes with them."""

from pathlib import Path

from torch import Tensor, nn

from nemotron.errors import UserError
from nemotron.hf.folder import check_folder, is_exported
from nemotron.hf.shards import ShardedFolder
from nemotron.precision.scales import LinearScales
from nemotron.precision.static import ModelScales, lacking

WEIGHT_SCALE = ".weight_scale"
CACHE_SCALES = (".k_scale", ".v_scale")


def read_scales(folder: Path) -> ModelScales | None:
    """Return the scales of an exported folder whose tensors are checked; None if it has none.

    ModelOpt's layout holds the scales themselves, that of compressed-tensors the reciprocals of
    NVFP4's float32 ones.
    """
    stored = ShardedFolder(folder)
    layers = [
        name.removesuffix(WEIGHT_SCALE) for name in stored.tensors if name.endswith(WEIGHT_SCALE)
    ]
    if not layers:
        return None
    cache = {
        name: stored.read(name).float().reshape(())
        for name in stored.tensors
        if name.endswith(CACHE_SCALES)
    }
    return ModelScales({layer: _scales_of(layer, stored) for layer in layers}, cache)


def read_like(folder: Path, model: nn.Module, key: str) -> ModelScales:
    """Return the scales of a quantized folder for a model, which may lie on the meta device.

    `key` is what names the folder.

    Raises:
        UserError: when it is no quantized folder, a damaged one, or one of another model.
    """
    if is_exported(folder):
        check_folder(folder)
    scales = read_scales(folder) if is_exported(folder) else None
    if scales is None:
        raise UserError(
            "is not a folder of a quantized model; write one with nemotron quantize.",
            key=key,
            value=str(folder),
        )
    if name := lacking(model, scales):
        raise UserError(
            f"has scales of {name}, which do not fit this model; quantize the model itself.",
            key=key,
            value=str(folder),
        )
    return scales


def _scales_of(layer: str, stored: ShardedFolder) -> LinearScales:
    blocks = stored.read(layer + WEIGHT_SCALE)
    given = _scalar(f"{layer}.input_scale", stored)
    if (outer := _scalar(f"{layer}.weight_scale_2", stored)) is not None:
        return LinearScales("nvfp4", blocks, outer, given)
    if (inverse := _scalar(f"{layer}.weight_global_scale", stored)) is not None:
        given = _scalar(f"{layer}.input_global_scale", stored)
        return LinearScales(
            "nvfp4",
            blocks,
            inverse.reciprocal(),
            None if given is None else given.reciprocal(),
        )
    scale = blocks.float()
    return LinearScales("fp8", scale.reshape(()) if scale.numel() == 1 else scale, None, given)


def _scalar(name: str, stored: ShardedFolder) -> Tensor | None:
    return stored.read(name).float().reshape(()) if name in stored.tensors else None
