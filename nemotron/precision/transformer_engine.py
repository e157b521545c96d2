"""Linear layers by Transformer Engine's modules, whose kernels quantize and multiply at once.

The modules hold no parameter of ours: the weight is put in for each call. Every setting of a
recipe is given, since Transformer Engine takes those that are missing from the environment.
Source: NVIDIA/TransformerEngine: transformer_engine/common/recipe/__init__.py.
"""

import dataclasses
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from nemotron.precision.config import NVFP4Config
from nemotron.precision.groups import Groups
from nemotron.precision.random_bits import Draw

MULTIPLES = {"fp8_current": 16, "fp8_block": 128, "mxfp8": 32, "nvfp4": 32}
"""What both sizes of a weight must be divisible by."""
ROW_MULTIPLES = {"fp8_current": 16, "fp8_block": 128, "mxfp8": 32, "nvfp4": 128}
"""To which rows are filled up with zeros, those of each expert for themselves.

Source: transformer_engine/pytorch/quantization.py, get_align_size_for_quantization.
"""


class TransformerEngineLayer:
    """What replaces the call of a module of ours; random bits are Transformer Engine's own."""

    def __init__(self, format: str, options: NVFP4Config) -> None:
        self._recipe = recipe_of(format, options)
        self._multiple = ROW_MULTIPLES[format]
        self._modules: dict[str, torch.nn.Module] = {}

    def linear(
        self, x: Float[Tensor, "M K"], weight: Float[Tensor, "N K"], draw: Draw | None
    ) -> Float[Tensor, "M N"]:
        """Return X Wᵀ."""
        te = import_module("transformer_engine.pytorch")
        if "weight" not in self._modules:
            sizes = (weight.shape[1], weight.shape[0])
            self._modules["weight"] = _emptied(te.Linear, sizes, x.device)
        filled = Groups((x.shape[0],), self._multiple).fill(x)
        with te.autocast(enabled=True, recipe=self._recipe):
            y = functional_call(
                self._modules["weight"], {"weight": weight.to(torch.bfloat16)}, (filled,)
            )
        return y[: x.shape[0]]

    def grouped(
        self,
        x: Float[Tensor, "R K"],
        weight: Float[Tensor, "E N K"],
        counts: Int[Tensor, " E"],
        name: str,
        draw: Draw | None,
    ) -> Float[Tensor, "R N"]:
        """Multiply each expert's rows by its matrix; `name` is that of the stacked matrices."""
        te = import_module("transformer_engine.pytorch")
        if name not in self._modules:
            sizes = (weight.shape[0], weight.shape[2], weight.shape[1])
            self._modules[name] = _emptied(te.GroupedLinear, sizes, x.device)
        groups = Groups(tuple(counts.tolist()), self._multiple)
        weights = {f"weight{i}": w for i, w in enumerate(weight.to(torch.bfloat16).unbind())}
        with te.autocast(enabled=True, recipe=self._recipe):
            splits = list(groups.filled)
            y = functional_call(self._modules[name], weights, (groups.fill(x), splits))
        return y[groups.offsets(x.device)]


def _emptied(
    kind: Callable[..., torch.nn.Module], sizes: tuple[int, ...], device: torch.device
) -> torch.nn.Module:
    """Return a module whose own weights take no memory, nor random numbers."""
    module = kind(
        *sizes,
        bias=False,
        params_dtype=torch.bfloat16,
        device=device,
        init_method=lambda weight: None,
    )
    for parameter in module.parameters():
        parameter.data = parameter.data.new_empty(0)
    return module


def recipe_of(format: str, options: NVFP4Config) -> Any:  # Any: the package is optional
    """Return Transformer Engine's recipe for what this project means by a format."""
    te = import_module("transformer_engine.common.recipe")
    split, fast = te.MMParams(use_split_accumulator=True), te.MMParams(use_split_accumulator=False)
    plain, power = te.QParams(power_2_scale=False), te.QParams(power_2_scale=True)
    common = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
    if format == "fp8_current":
        return _make(
            te.Float8CurrentScaling,
            common,
            use_power_2_scales=False,
            fp8_format=te.Format.HYBRID,
            fp8_quant_fwd_inp=plain,
            fp8_quant_fwd_weight=plain,
            fp8_quant_bwd_grad=plain,
            fp8_gemm_fprop=fast,
            fp8_gemm_dgrad=split,
            fp8_gemm_wgrad=split,
        )
    if format == "fp8_block":
        return _make(
            te.Float8BlockScaling,
            common,
            use_f32_scales=False,
            fp8_format=te.Format.E4M3,
            fp8_quant_fwd_inp=power,
            fp8_quant_fwd_weight=power,
            fp8_quant_bwd_grad=power,
            x_block_scaling_dim=1,
            w_block_scaling_dim=2,
            grad_block_scaling_dim=1,
            fp8_gemm_fprop=split,
            fp8_gemm_dgrad=split,
            fp8_gemm_wgrad=split,
        )
    if format == "mxfp8":
        return _make(
            te.MXFP8BlockScaling,
            common,
            margin=0,
            fp8_format=te.Format.E4M3,
            enable_2d_quantization=False,
        )
    assert format == "nvfp4", format
    return _make(
        te.NVFP4BlockScaling,
        common,
        disable_rht=not options.hadamard,
        disable_stochastic_rounding=not options.stochastic_rounding,
        disable_2d_quantization=not options.square_weights,
        row_scaled_activation=False,
        nvfp4_4over6="none",
        nvfp4_4over6_e4m3_use_256="all",
        nvfp4_4over6_err_mode="MAE",
        fp4_format=te.Format.E2M1,
        fp8_format=te.Format.E4M3,
    )


def _make(kind: type, common: dict[str, Any], **values: Any) -> Any:
    """Return a recipe with all values: a version's fields by its constructor, the rest after it.

    What a version does not know at all it cannot read from the environment either.
    """
    values |= common
    fields = {field.name for field in dataclasses.fields(kind)}
    made = kind(**{name: value for name, value in values.items() if name in fields})
    for name in values.keys() - fields:
        if hasattr(made, name):
            setattr(made, name, values[name])
    return made
