"""What Transformer Engine is asked for, told by a stand-in; its kernels need a GPU to be tested."""

import sys
from pathlib import Path

import pytest
import torch

from nemotron.precision.config import NVFP4Config
from nemotron.precision.transformer_engine import TransformerEngineLayer, recipe_of

RECIPE = """
import enum, os
from dataclasses import dataclass, field

class Format(enum.Enum):
    E2M1 = 1
    E4M3 = 2
    HYBRID = 3

@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True

@dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False

def env(name): return os.getenv(name)

@dataclass
class Float8CurrentScaling:
    use_power_2_scales: object = field(default_factory=lambda: env("POWER"))
    fp8_format: object = None
    fp8_quant_fwd_inp = QParams(True)
    fp8_quant_fwd_weight = QParams(True)
    fp8_quant_bwd_grad = QParams(True)
    fp8_gemm_fprop: object = None
    fp8_gemm_dgrad: object = None
    fp8_gemm_wgrad: object = None
    fp8_dpa: object = None
    fp8_mha: object = None
    backward_override: object = field(default_factory=lambda: env("OVERRIDE"))

@dataclass
class Float8BlockScaling:
    use_f32_scales: object = field(default_factory=lambda: env("POWER"))
    fp8_format: object = None
    fp8_quant_fwd_inp = QParams(False)
    fp8_quant_fwd_weight = QParams(False)
    fp8_quant_bwd_grad = QParams(False)
    fp8_gemm_fprop: object = None
    fp8_gemm_dgrad: object = None
    fp8_gemm_wgrad: object = None
    fp8_dpa: object = None
    fp8_mha: object = None
    backward_override: object = field(default_factory=lambda: env("OVERRIDE"))
    x_block_scaling_dim: object = None
    w_block_scaling_dim: object = None
    grad_block_scaling_dim: object = None

@dataclass
class MXFP8BlockScaling:
    margin: object = None
    fp8_format: object = None
    fp8_dpa: object = None
    fp8_mha: object = None
    backward_override: object = field(default_factory=lambda: env("OVERRIDE"))

@dataclass
class NVFP4BlockScaling:
    disable_rht: object = field(default_factory=lambda: env("RHT"))
    disable_stochastic_rounding: object = field(default_factory=lambda: env("SR"))
    disable_2d_quantization: object = None
    row_scaled_activation: object = None
    fp4_format: object = None
    fp8_format: object = None
    fp8_dpa: object = None
    fp8_mha: object = None
    backward_override: object = field(default_factory=lambda: env("OVERRIDE"))
"""
MODULES = """
import contextlib
import torch

calls = []

@contextlib.contextmanager
def autocast(enabled, recipe):
    calls.append(recipe)
    yield
    calls.append("end")

class Linear(torch.nn.Module):
    def __init__(self, width, out, *, bias, params_dtype, device, init_method):
        super().__init__()
        assert bias is False and init_method(None) is None
        weight = torch.full((out, width), torch.nan, dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        assert calls[-1] != "end"
        calls.append(x.shape[0])
        return x @ self.weight.T

class GroupedLinear(torch.nn.Module):
    def __init__(self, count, width, out, *, bias, params_dtype, device, init_method):
        super().__init__()
        assert bias is False and init_method(None) is None
        self.count = count
        for i in range(count):
            weight = torch.full((out, width), torch.nan, dtype=params_dtype, device=device)
            setattr(self, f"weight{i}", torch.nn.Parameter(weight))

    def forward(self, x, m_splits):
        assert calls[-1] != "end" and len(m_splits) == self.count
        calls.append(m_splits)
        parts = x.split(m_splits)
        return torch.cat([p @ getattr(self, f"weight{i}").T for i, p in enumerate(parts)])
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch) -> list:
    package = tmp_path / "transformer_engine"
    for folder in ("", "common", "pytorch"):
        (package / folder).mkdir(exist_ok=True)
        (package / folder / "__init__.py").touch()
    (package / "common" / "recipe.py").write_text(RECIPE)
    (package / "pytorch" / "__init__.py").write_text(MODULES)
    monkeypatch.syspath_prepend(tmp_path)
    for variable in ("POWER", "OVERRIDE", "RHT", "SR"):
        monkeypatch.setenv(variable, "from the environment")
    yield __import__("transformer_engine.pytorch").pytorch.calls
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]


@pytest.mark.parametrize("format", ["fp8_current", "fp8_block", "mxfp8", "nvfp4"])
def test_no_setting_of_a_recipe_is_left_to_the_environment(calls, format: str):
    recipe = recipe_of(format, NVFP4Config(hadamard=False))
    values = vars(recipe)
    assert "from the environment" not in values.values()
    assert values["backward_override"] is None
    assert all(value is not None for n, value in values.items() if n != "backward_override")
    if format == "nvfp4":
        assert (recipe.disable_rht, recipe.disable_stochastic_rounding) == (True, False)
        assert recipe.disable_2d_quantization is False
    if format in ("fp8_current", "fp8_block"):
        # no fields of the class, so they are set on the object
        assert recipe.fp8_quant_bwd_grad.power_2_scale is (format == "fp8_block")
    expected = "HYBRID" if format == "fp8_current" else "E4M3"
    assert recipe.fp8_format.name == expected


def test_a_layer_calls_the_module_with_its_own_weight_and_whole_blocks_of_rows(calls):
    layer = TransformerEngineLayer("mxfp8", NVFP4Config())
    x = torch.randn(35, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(96, 64, requires_grad=True)
    y = layer.linear(x, weight, None)
    assert y.shape == (35, 96)
    assert torch.equal(y, x @ weight.bfloat16().T)
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.shape == x.shape
    recipe, rows, end = calls
    assert (type(recipe).__name__, rows, end) == ("MXFP8BlockScaling", 64, "end")
    layer.linear(x, weight * 2, None)
    assert calls[3] is recipe
    module = layer._modules["weight"]
    assert all(p.numel() == 0 for p in module.parameters())


def test_each_experts_rows_are_padded_for_themselves(calls):
    layer = TransformerEngineLayer("fp8_current", NVFP4Config())
    counts = torch.tensor([20, 0, 16, 3])
    x = torch.randn(39, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 48, 32, requires_grad=True)
    y = layer.grouped(x, weight, counts, "up_proj", None)
    expected = torch.cat([
        part @ matrix.bfloat16().T
        for part, matrix in zip(x.split(counts.tolist()), weight, strict=True)
    ])  # fmt: skip
    # bfloat16 products of other numbers of rows
    assert torch.allclose(y, expected, rtol=2**-7, atol=2**-6)
    assert calls[1] == [32, 0, 16, 16]
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[1].any()
    assert weight.grad[3].any()
