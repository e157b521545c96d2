"""Which linear layers a preset quantizes, and to what: rules by the role of a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from nemotron.errors import UserError
from nemotron.precision.nvfp4 import BLOCK
from nemotron.precision.policy import kind_of, linear_layers
from nemotron.precision.scales import StoredFormat

WeightObserver = Literal["max", "mse", "four_over_six"]
"""How the scales of NVFP4 weights are found; FP8 always takes the largest magnitude."""
InputObserver = Literal["max", "percentile", "mse"]
"""How far the fixed scale of an input reaches: to the largest magnitude that calibration saw, to
that which 99.99 % do not exceed, or to that of the smallest squared error in FP8."""

EXPERTS = ("moe.experts", "moe.shared_experts", "mlp")
MAMBA = ("mamba.*",)
EVERY = ("*",)


@dataclass(frozen=True)
class QuantizationPreset:
    """Formats by kind of layer, as in `nemotron.precision.policy.KINDS`; all others are bfloat16.

    Router, embedding, head, norms, convolution and the block for multi-token prediction are in no
    preset.
    """

    meaning: str
    rules: Mapping[str, StoredFormat]
    cache: bool = False
    """Whether keys and values are in FP8 with a fixed scale."""
    weights: WeightObserver = "max"


def _preset(
    meaning: str,
    *,
    fp8: Sequence[str] = (),
    nvfp4: Sequence[str] = (),
    cache: bool = False,
    weights: WeightObserver = "max",
) -> QuantizationPreset:
    rules: dict[str, StoredFormat] = dict.fromkeys(nvfp4, "nvfp4")
    rules |= dict.fromkeys(fp8, "fp8")
    return QuantizationPreset(meaning, rules, cache, weights)


_SUPER_FP8 = ("moe.shared_experts", "mlp", *MAMBA)
PRESETS = {
    "fp8_conservative": _preset("routed and shared experts in FP8", fp8=EXPERTS),
    "fp8_aggressive": _preset("experts and Mamba in FP8", fp8=(*EXPERTS, *MAMBA)),
    "super_fp8": _preset(
        "as the released FP8 Super: experts, Mamba and KV cache in FP8",
        fp8=(*EXPERTS, *MAMBA),
        cache=True,
    ),
    "fp8": _preset("every linear layer in FP8", fp8=EVERY),
    "nvfp4_conservative": _preset("routed and shared experts in NVFP4", nvfp4=EXPERTS),
    "nvfp4_aggressive": _preset("experts and Mamba in NVFP4", nvfp4=(*EXPERTS, *MAMBA)),
    "super_nvfp4": _preset(
        "as Super's recipe: routed experts in NVFP4, shared experts, Mamba and KV cache in FP8",
        nvfp4=("moe.experts",),
        fp8=_SUPER_FP8,
        cache=True,
        weights="mse",
    ),
    "ultra_nvfp4": _preset(
        "as Ultra's recipe: super_nvfp4 with four-over-six",
        nvfp4=("moe.experts",),
        fp8=_SUPER_FP8,
        cache=True,
        weights="four_over_six",
    ),
    "nvfp4": _preset("every linear layer in NVFP4", nvfp4=EVERY),
}
"""Source: NVIDIA/Model-Optimizer: modelopt_recipes/ (mamba_moe_*, nvfp4-mse.yaml, nvfp4-4o6)."""


def find_preset(name: str) -> QuantizationPreset:
    """Return the preset of that name.

    Raises:
        UserError: when there is none.
    """
    if name not in PRESETS:
        raise UserError(f"is unknown; use one of {', '.join(PRESETS)}.", key="--preset", value=name)
    return PRESETS[name]


def find_observer(name: str | None, preset: QuantizationPreset) -> WeightObserver:
    """Return the observer of that name, or the preset's own.

    Raises:
        UserError: when there is none.
    """
    if name is None:
        return preset.weights
    found = [observer for observer in get_args(WeightObserver) if observer == name]
    if not found:
        raise UserError(
            f"is unknown; use one of {', '.join(get_args(WeightObserver))}.",
            key="--weights",
            value=name,
        )
    observer: WeightObserver = found[0]
    return observer


def find_input_observer(name: str) -> InputObserver:
    """Return the observer of inputs of that name.

    Raises:
        UserError: when there is none.
    """
    known: tuple[InputObserver, ...] = get_args(InputObserver)
    for observer in known:
        if observer == name:
            return observer
    raise UserError(f"is unknown; use one of {', '.join(known)}.", key="--inputs", value=name)


def quantizable(model: nn.Module) -> list[str]:
    """Return the linear layers that a format may be given to, in order."""
    return [name for name in linear_layers(model) if not name.startswith("mtp.")]


def assign(
    model: nn.Module, preset: QuantizationPreset, keep: Sequence[str] = ()
) -> dict[str, StoredFormat]:
    """Return the format of each layer that is quantized, by its name in the model.

    `keep` are patterns of names that stay in bfloat16, such as `backbone.layers.0.*`.

    Raises:
        UserError: when a pattern fits nothing, or a layer does not fit its format.
    """
    names = quantizable(model)
    for pattern in keep:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"fits no linear layer; names are such as {names[0]}.", key="--keep", value=pattern
            )
    table: dict[str, StoredFormat] = {}
    for name in names:
        if any(fnmatchcase(name, pattern) for pattern in keep):
            continue
        kind = kind_of(name)
        assert kind is not None
        format = next((to for rule, to in preset.rules.items() if fnmatchcase(kind, rule)), None)
        if format is not None:
            table[name] = format
    check_shapes(model, table)
    return table


def fits(module: nn.Module, format: StoredFormat) -> bool:
    """Return whether a layer can be stored in a format."""
    parameters = module.parameters(recurse=False)
    return format != "nvfp4" or all(weight.shape[-1] % BLOCK == 0 for weight in parameters)


def check_shapes(model: nn.Module, table: Mapping[str, StoredFormat]) -> None:
    """Check that each layer can be stored in its format.

    Raises:
        UserError: when one cannot.
    """
    for name, format in table.items():
        module = model.get_submodule(name)
        if not fits(module, format):
            sizes = sorted({weight.shape[-1] for weight in module.parameters(recurse=False)})
            raise UserError(
                f"reads {' and '.join(map(str, sizes))} values, but NVFP4 has blocks of "
                f"{BLOCK}; keep it in bfloat16: --keep '{name}'.",
                key=name,
            )
