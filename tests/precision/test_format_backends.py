"""Which backend computes a format where, and that each multiplies what was quantized."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron.cli import run
from nemotron.errors import UserError
from nemotron.model.hybrid import HybridLM
from nemotron.precision import backends
from nemotron.precision.apply import Quantization
from nemotron.precision.backends import BACKENDS, BY_NAME, FORMATS, FormatCall, choose, format_call
from nemotron.precision.config import DelayedConfig, NVFP4Config, PrecisionConfig
from nemotron.precision.delayed import DelayedFP8Scheme, Histories
from nemotron.precision.policy import assign, summarize
from nemotron.precision.random_bits import Draw
from nemotron.precision.schemes import SCHEMES, Scheme
from nemotron.recipe.load import load_recipe
from tests.support.operands import product

RECIPES = Path(__file__).parents[2] / "recipes"
DRAW = Draw(11)
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def scheme_of(format: str, device: torch.device = CPU, tensors: int = 1) -> Scheme:
    """A scheme; the delayed one has scales from a step that had seen other magnitudes."""
    if format != "fp8_delayed":
        return SCHEMES[format]
    histories = Histories({"layer": tensors}, DelayedConfig(), device)
    scheme = DelayedFP8Scheme(histories.slots("layer", count=tensors))
    for operand, amax in (("x", 3.0), ("w", 0.5), ("dy", 2e-3)):
        scheme.remember(operand, torch.full((tensors, 1), amax, device=device), (1,) * tensors)
    histories.roll(lambda amaxes: amaxes)
    return scheme


def inputs(device: torch.device, tokens: int = 35, width: int = 80, out: int = 112):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=g).bfloat16()
    weight = torch.randn(out, width, generator=g) / 8
    dy = (torch.randn(tokens, out, generator=g) * 1e-3).bfloat16()
    return x.to(device), weight.to(device), dy.to(device)


def results(format: str, name: str, device: torch.device, wide: bool = True):
    """Output and gradients of a layer, and those of the decoded operands in float64."""
    x, weight, dy = inputs(device)
    scheme = scheme_of(format, device)
    row, columnwise = scheme.quantize("w", weight.bfloat16())
    dy_row, dy_columnwise = scheme.quantize("dy", dy, draw=DRAW)
    exact = (
        product(scheme.quantize("x", x)[0], row),
        product(dy_row, columnwise),
        product(dy_columnwise, scheme.quantize("x", x)[1]),
    )
    layer = BY_NAME[name].function({"weight": scheme}, format, NVFP4Config())
    if wide:
        x, dy = x.float(), dy.float()
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = layer.linear(x, weight, DRAW)
    y.backward(dy)
    return (y.detach(), x.grad, weight.grad), exact


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (format, backend.name)
        for backend in BACKENDS
        for format in FORMATS
        if format in backend.cpu_formats
    ],
)
def test_products_and_gradients_are_those_of_the_quantized_operands(format: str, name: str):
    if reason := BY_NAME[name].unfit(format_call(format, CPU, (112, 80))):
        pytest.skip(f"{name} for {format}: {reason}")
    found, exact = results(format, name, CPU)
    for ours, theirs in zip(found, exact, strict=True):
        # float32 sums of at most 112 terms
        assert (ours.double() - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    narrow, _ = results(format, name, CPU, wide=False)
    assert [t.dtype for t in narrow] == [torch.bfloat16, torch.bfloat16, torch.float32]
    # one rounding to bfloat16 of those sums
    assert (narrow[0].double() - exact[0]).abs().max() <= 2**-8 * exact[0].abs().max()


@pytest.mark.parametrize("format", ["fp8_current", "fp8_delayed"])
def test_experts_have_each_backends_products(format: str):
    if reason := BY_NAME["torch"].unfit(format_call(format, CPU, (112, 80))):
        pytest.skip(reason)
    counts = torch.tensor([20, 0, 15])
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 112, 80, generator=g) / 8
    x, _, dy = inputs(CPU)
    found = []
    for name in ("emulate", "torch"):
        scheme = scheme_of(format, tensors=3)
        layer = BY_NAME[name].function({"up": scheme}, format, NVFP4Config())
        w, leaf = weight.clone().requires_grad_(), x.float().requires_grad_()
        y = layer.grouped(leaf, w, counts, "up", DRAW)
        y.backward(dy.float())
        found.append((y.detach(), leaf.grad, w.grad))
    for ours, theirs in zip(*found, strict=True):
        # the same operands, float32 sums of at most 112 terms
        assert (ours - theirs).abs().max() <= 1e-6 * ours.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_a_gpu_has_the_products_of_the_quantized_operands(format: str, name: str):
    if reason := BY_NAME[name].unfit(format_call(format, CUDA, (112, 80))):
        pytest.skip(f"{name} for {format}: {reason}")
    found, exact = results(format, name, CUDA, wide=False)
    for ours, theirs in zip(found, exact, strict=True):
        # bfloat16 results; the sums on Hopper keep fewer than float32's bits. Transformer Engine
        # draws other random bits for NVFP4's gradients
        limit = 0.1 if name == "transformer_engine" and format == "nvfp4" else 2**-7
        assert (ours.double() - theirs).norm() <= limit * theirs.norm()


@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_bfloat16_holds_the_values_that_a_gpu_multiplies_in_it(format: str):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=g) * 2.0 ** torch.randint(-30, 30, (64, 1), generator=g)
    for operand in ("x", "w", "dy"):
        for side in SCHEMES[format].quantize(operand, x, draw=DRAW):
            decoded_side = side.operand()
            assert decoded_side.is_narrow
            assert torch.equal(decoded_side.narrow().values.float(), decoded_side.values)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["mxfp8", "nvfp4"])
def test_a_gpu_sums_narrow_products_in_float32(format: str):
    found, exact = results(format, "emulate", CUDA)
    for ours, theirs in zip(found, exact, strict=True):
        # sums of at most 112 terms, of which a tensor core keeps a few bits less than float32
        assert (ours.double() - theirs).norm() <= 1e-5 * theirs.norm()


def on(capability: tuple[int, int], format: str, cuda=(13, 0), shape=(256, 128)) -> FormatCall:
    return FormatCall("cuda", torch.bfloat16, frozenset(), format, capability, cuda, shape)


HOPPER, BLACKWELL, CONSUMER, ADA, AMPERE = (9, 0), (10, 0), (12, 0), (8, 9), (8, 0)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        (AMPERE, ["emulate"] * 5),
        (ADA, ["torch", "torch", "emulate", "emulate", "emulate"]),
        (HOPPER, ["triton", "triton", "triton", "emulate", "emulate"]),
        (BLACKWELL, ["torch", "torch", "emulate", "torch", "torch"]),
        (CONSUMER, ["torch", "torch", "emulate", "torch", "torch"]),
    ],
)
def test_auto_takes_what_the_gpu_has_in_hardware(capability, expected):
    formats = ["fp8_delayed", "fp8_current", "fp8_block", "mxfp8", "nvfp4"]
    assert [choose("auto", on(capability, f), "layer").name for f in formats] == expected


def test_transformer_engine_comes_first_where_it_is_installed(monkeypatch):
    installed = replace(BACKENDS[0], packages=())
    monkeypatch.setattr(backends, "BACKENDS", (installed, *BACKENDS[1:]))
    assert choose("auto", on(HOPPER, "fp8_block"), "layer").name == "transformer_engine"
    assert choose("auto", on(BLACKWELL, "nvfp4"), "layer").name == "transformer_engine"
    assert choose("auto", on(CONSUMER, "nvfp4"), "layer").name == "torch"
    assert choose("auto", on(HOPPER, "mxfp8"), "layer").name == "emulate"
    monkeypatch.setitem(backends.BY_NAME, "transformer_engine", installed)
    with pytest.raises(UserError, match="would keep the scales where no checkpoint finds them"):
        choose("transformer_engine", on(HOPPER, "fp8_delayed"), "layer")
    assert choose("auto", on(HOPPER, "fp8_delayed"), "layer").name == "triton"
    # Nano's experts are 1856 wide: no multiple of 128
    narrow = on(HOPPER, "fp8_block", shape=(1856, 2688))
    assert choose("auto", narrow, "layer").name == "triton"
    split = replace(on(BLACKWELL, "nvfp4"), needs=frozenset({"split_operands"}))
    assert choose("auto", split, "layer").name == "torch"


def test_torch_takes_over_where_triton_is_missing(monkeypatch):
    absent = [
        replace(b, packages=("no_such_package",)) if b.name == "triton" else b for b in BACKENDS
    ]
    monkeypatch.setattr(backends, "BACKENDS", tuple(absent))
    assert choose("auto", on(HOPPER, "fp8_block"), "layer").name == "torch"


def test_a_cpu_emulates_unless_another_backend_is_named():
    assert {choose("auto", format_call(f, CPU), "x").name for f in FORMATS} == {"emulate"}
    assert choose("torch", format_call("fp8_current", CPU), "x").name == "torch"


@pytest.mark.parametrize(
    ("name", "call", "sentence"),
    [
        (
            "transformer_engine",
            format_call("mxfp8", CPU),
            "precision.backend = transformer_engine is not fit for layer in mxfp8: runs on cuda, "
            "not on cpu; use auto or emulate.",
        ),
        (
            "transformer_engine",
            on(HOPPER, "fp8_current"),
            "precision.backend = transformer_engine is not fit for layer in fp8_current: package "
            "transformer_engine is not installed (pip install 'transformer-engine[pytorch]>=2.14' "
            "--no-build-isolation); use auto or triton or torch or emulate.",
        ),
        (
            "torch",
            format_call("nvfp4", CPU),
            "precision.backend = torch is not fit for layer in nvfp4: does not have nvfp4 on a "
            "CPU; use auto or emulate.",
        ),
        (
            "torch",
            on(HOPPER, "mxfp8"),
            "precision.backend = torch is not fit for layer in mxfp8: needs compute capability "
            "10.0 or newer, this GPU has 9.0; use auto or emulate.",
        ),
        (
            "torch",
            on(BLACKWELL, "fp8_block"),
            "precision.backend = torch is not fit for layer in fp8_block: needs compute "
            "capability 9.0 to 9.9, this GPU has 10.0; use auto or emulate.",
        ),
        (
            "torch",
            on(HOPPER, "fp8_block", cuda=(12, 6)),
            "precision.backend = torch is not fit for layer in fp8_block: needs torch for CUDA "
            "12.9 or newer, not 12.6; use auto or emulate.",
        ),
    ],
)
def test_a_named_backend_that_is_not_fit_is_refused(name: str, call: FormatCall, sentence: str):
    with pytest.raises(UserError) as caught:
        choose(name, call, "layer")
    assert str(caught.value) == sentence


def test_sizes_and_split_operands_are_told(monkeypatch):
    installed = replace(BACKENDS[0], packages=())
    monkeypatch.setitem(backends.BY_NAME, "transformer_engine", installed)
    with pytest.raises(UserError, match="takes multiples of 128, not a weight of 1856 x 2688; use"):
        choose("transformer_engine", on(HOPPER, "fp8_block", shape=(1856, 2688)), "layer")
    split = replace(on(BLACKWELL, "nvfp4"), needs=frozenset({"split_operands"}))
    with pytest.raises(UserError, match="does not honor split_operands"):
        choose("transformer_engine", split, "layer")


def test_the_table_and_its_summary_name_each_layers_backend():
    with torch.device("meta"):
        model = HybridLM(load_recipe(RECIPES / "tiny/smoke.yaml").config.model)
    values = {"compute": "bf16", "preset": "fp8_current", "backend": "torch"}
    config = PrecisionConfig.model_validate(values)
    table = assign(model, config, "fp8_current", CPU)
    assert {(line.format, line.backend) for line in table} <= {
        ("bf16", ""),
        ("fp8_current", "torch"),
    }
    lines = summarize(assign(model, config, "fp8_delayed", CPU))
    assert all(line.endswith(": default of fp8_delayed (torch)") for line in lines)
    assert all(line.startswith("fp8_delayed ") for line in lines)
    assert summarize(assign(model, config, "bf16", CPU))[0].endswith(": default of bf16")
    with pytest.raises(UserError, match="torch is not fit for backbone"):
        assign(model, config, "nvfp4", CPU)


def test_a_model_computes_by_the_backend_that_is_named():
    outputs = {}
    for name in ("emulate", "torch"):
        model = HybridLM(load_recipe(RECIPES / "tiny/smoke.yaml").config.model)
        model.init_weights(1)
        model.compute_dtype = torch.bfloat16
        values = {"compute": "bf16", "preset": "fp8_delayed", "backend": name}
        quantization = Quantization(model, PrecisionConfig.model_validate(values), seed=1)
        assert {line.backend for line in quantization.table} == {name}
        # FSDP2 warns of views: what changes them in place escapes its hooks
        layer = model.get_submodule(quantization.table[0].module)
        assert layer(torch.randn(2, 3, layer.weight.shape[1]).bfloat16())._base is None
        hidden = model(torch.arange(64).view(2, 32))
        hidden.float().square().sum().backward()
        outputs[name] = hidden.detach().double()
    # the same numbers are multiplied; sums differ in their last bits, and so do roundings after
    error = (outputs["torch"] - outputs["emulate"]).norm() / outputs["emulate"].norm()
    assert error < 0.02


def test_the_command_line_refuses_a_backend_that_is_not_here(capsys):
    words = ["precision.compute=bf16", "precision.preset=nvfp4_super", "precision.backend=torch"]
    assert run(["recipe", "show", str(RECIPES / "tiny/smoke.yaml"), *words, "--precision"]) == 2
    told = capsys.readouterr().err
    assert "precision.backend = torch is not fit for backbone.layers." in told.replace("\n", " ")


def test_the_doctor_says_which_formats_are_native_here(capsys):
    assert run(["doctor"]) == 0
    output = capsys.readouterr().out
    for format in FORMATS:
        (line,) = (x for x in output.splitlines() if f"{format} " in x and "on a CPU" not in x)
        assert "chosen: emulated" in line
    assert "runs on cuda, not on cpu" in output


def test_the_schema_of_a_recipe_knows_formats_and_backends():
    command = [sys.executable, "-m", "nemotron", "recipe", "schema"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    precision = json.loads(text)["$defs"]["PrecisionConfig"]["properties"]
    assert precision["backend"]["enum"] == [
        "auto",
        "emulate",
        "torch",
        "triton",
        "transformer_engine",
    ]
    assert "fp8_delayed" in precision["preset"]["enum"]
