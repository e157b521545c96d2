"""Check our quantizers against a folder of golden vectors, bit by bit.

    python tools/check_golden.py DIR

DIR holds safetensors files named and filled as those in tests/precision/golden: inputs, and what
public references made of them. Prints a line for each file, and for each tensor that differs its
file, case, name and number of differences. Exits with 1 on any difference, 2 when DIR cannot be
used. Quantized values must have the same bits; products may differ by 2e-6 of their largest value.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nemotron.precision import fp8, hadamard, mxfp8, nvfp4
from nemotron.precision.formats import E4M3, E5M2, FP8, pack_e2m1
from nemotron.precision.linear import quantized_linear
from nemotron.precision.schemes import SCHEMES

Tensors = dict[str, Tensor]
Results = Iterator[tuple[str, Tensor]]
"""Name of a tensor and what we make of it."""

SUM_TOLERANCE = 2e-6
"""Of the largest value, for products: the order of float32 additions is free."""
FORMATS: dict[str, FP8] = {"e4m3": E4M3, "e5m2": E5M2}


@dataclass(frozen=True)
class Difference:
    """A tensor that is not what it should be."""

    file: str
    name: str
    what: str

    def __str__(self) -> str:
        case, _, tensor = self.name.partition(".")
        return f"{self.file}: {case}: {tensor}: {self.what}"


def nvfp4_results(
    prefix: str, found: nvfp4.NVFP4, golden: Tensors, *, columnwise: bool = False
) -> Results:
    codes, scales, values = found.codes, found.scales.bytes, found.dequantize()
    height = found.scales.height
    if columnwise:
        codes, scales, values, height = codes.T, scales.T, values.T, found.scales.width
    yield f"{prefix}.codes", pack_e2m1(codes)
    yield f"{prefix}.scales", scales.repeat_interleave(height, 0)
    yield f"{prefix}.amax", found.scales.amax
    if f"{prefix}.dequant" in golden:
        yield f"{prefix}.dequant", values


def check_nvfp4(golden: Tensors, case: str) -> Results:
    x = golden[f"{case}.x"]
    yield from nvfp4_results(f"{case}.row", nvfp4.quantize(x), golden)
    upright = nvfp4.quantize(x, height=nvfp4.BLOCK, width=1)
    yield from nvfp4_results(f"{case}.col", upright, golden, columnwise=True)


def check_nvfp4_squares(golden: Tensors, case: str) -> Results:
    found = nvfp4.quantize(golden[f"{case}.x"], height=nvfp4.BLOCK)
    yield from nvfp4_results(f"{case}.row", found, golden)
    yield from nvfp4_results(f"{case}.col", found, golden, columnwise=True)


def check_hadamard(golden: Tensors, case: str) -> Results:
    if case == "matrix":
        yield "matrix.signs", hadamard.matrix(signs=True)
        yield "matrix.nosigns", hadamard.matrix(signs=False)
        return
    x = golden[f"{case}.x"]
    yield from nvfp4_results(f"{case}.row", nvfp4.quantize(x), golden)
    for name, signs in (("signs", True), ("nosigns", False)):
        tokens = hadamard.transform(x, signs=signs)
        yield f"{case}.{name}.rht_xt", tokens.T
        upright = nvfp4.quantize(tokens, height=nvfp4.BLOCK, width=1)
        yield from nvfp4_results(f"{case}.{name}.col", upright, golden, columnwise=True)


def check_mxfp8(golden: Tensors, case: str, format: FP8) -> Results:
    x = golden[f"{case}.x"]
    row = mxfp8.quantize(x, format)
    upright = mxfp8.quantize(x, format, height=mxfp8.BLOCK, width=1)
    for side, found in (("row", row), ("col", upright)):
        results = {"codes": found.codes, "scales": found.scales, "dequant": found.dequantize()}
        for name, tensor in results.items():
            if name != "dequant" or f"{case}.{side}.dequant" in golden:
                yield f"{case}.{side}.{name}", tensor if side == "row" else tensor.T


def check_mxfp8_squares(golden: Tensors, case: str) -> Results:
    found = mxfp8.quantize(golden[f"{case}.x"], height=mxfp8.BLOCK)
    yield f"{case}.codes", found.codes
    yield f"{case}.row.scales", found.scales.repeat_interleave(mxfp8.BLOCK, 0)
    yield f"{case}.col.scales", found.scales.repeat_interleave(mxfp8.BLOCK, 1)
    yield f"{case}.dequant", found.dequantize()


def check_current(golden: Tensors, case: str) -> Results:
    for name, format in FORMATS.items():
        for suffix, power_of_two in (("", False), (".pow2", True)):
            prefix = f"{case}.{name}{suffix}"
            if f"{prefix}.codes" not in golden:
                continue
            found = fp8.quantize_current(golden[f"{case}.x"], format, power_of_two=power_of_two)
            yield f"{prefix}.codes", found.codes
            yield f"{prefix}.scale", found.scale.view(1)
            yield f"{prefix}.scale_inv", found.scale_inv.view(1)
            yield f"{prefix}.dequant", found.dequantize()


def check_blocks(golden: Tensors, case: str, *, height: int) -> Results:
    x = golden[f"{case}.x"]
    for name, format in FORMATS.items():
        for kind, power_of_two in (("pow2", True), ("fp32", False)):
            for side, shape in (("row", (height, fp8.BLOCK)), ("col", (fp8.BLOCK, height))):
                prefix = f"{case}.{name}.{kind}.{side}"
                if f"{prefix}.codes" not in golden:
                    continue
                found = fp8.quantize_blocks(
                    x, format, height=shape[0], width=shape[1], power_of_two=power_of_two
                )
                results = (found.codes, found.scale_inv, found.dequantize())
                codes, scales, values = (t if side == "row" else t.T for t in results)
                yield f"{prefix}.codes", codes
                yield f"{prefix}.scale_inv", scales
                yield f"{prefix}.dequant", values


def check_linear(golden: Tensors, case: str) -> Results:
    x, w, dy = (golden[f"{case}.{name}"] for name in INPUTS)
    x = x.float().requires_grad_()
    w = w.float().requires_grad_()
    y = quantized_linear(x, w, SCHEMES["nvfp4"])
    y.backward(dy.float())
    assert x.grad is not None
    assert w.grad is not None
    yield from ((f"{case}.y", y.detach()), (f"{case}.dx", x.grad), (f"{case}.dw", w.grad))


CHECKS: dict[str, Callable[[Tensors, str], Results]] = {
    "nvfp4_1x16": check_nvfp4,
    "nvfp4_16x16": check_nvfp4_squares,
    "nvfp4_rht16": check_hadamard,
    "nvfp4_linear": check_linear,
    "mxfp8_e4m3": lambda golden, case: check_mxfp8(golden, case, E4M3),
    "mxfp8_e5m2": lambda golden, case: check_mxfp8(golden, case, E5M2),
    "mxfp8_2d_e4m3": check_mxfp8_squares,
    "fp8_current_scaling": check_current,
    "fp8_block_1x128": lambda golden, case: check_blocks(golden, case, height=1),
    "fp8_block_128x128": lambda golden, case: check_blocks(golden, case, height=fp8.BLOCK),
}
"""What is known of each file, by its name without an ending."""
INPUTS = ("x", "w", "dy")


def compare(ours: Tensor, theirs: Tensor, *, is_sum: bool) -> str | None:
    """Say how two tensors differ, or return None; sums may differ in the last digits."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"is {ours.dtype} {list(ours.shape)}, must be {theirs.dtype} {list(theirs.shape)}"
    if is_sum:
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        return f"differs by {error:.1e} of the largest value" if error > SUM_TOLERANCE else None
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    a, b = ours.contiguous().view(width), theirs.contiguous().view(width)
    both_nan = (ours.isnan() & theirs.isnan()) if ours.is_floating_point() else torch.zeros(())
    wrong = (a != b) & ~both_nan.bool()
    count = int(wrong.sum())
    return f"{count} of {wrong.numel()} values differ" if count else None


def check_file(path: Path) -> tuple[int, list[Difference]]:
    """Return how many tensors were compared, and those that differ."""
    golden = load_file(path)
    cases = sorted({name.split(".")[0] for name in golden})
    differences, compared = [], set()
    for case in cases:
        for name, ours in CHECKS[path.stem](golden, case):
            if name not in golden:
                differences.append(Difference(path.name, name, "is not in the file"))
                continue
            compared.add(name)
            is_sum = path.stem == "nvfp4_linear"
            if what := compare(ours, golden[name], is_sum=is_sum):
                differences.append(Difference(path.name, name, what))
    for name in golden:
        if name not in compared and name.split(".")[-1] not in INPUTS:
            differences.append(Difference(path.name, name, "was not compared with anything"))
    return len(compared), differences


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: check_golden.py DIR, a folder of golden vectors", file=sys.stderr)
        return 2
    paths = sorted(Path(arguments[0]).glob("*.safetensors"))
    if not paths:
        print(f"{arguments[0]} holds no .safetensors file", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        if path.stem not in CHECKS:
            print(f"{path.name}: no check is known for a file of this name")
            failed = True
            continue
        try:
            compared, differences = check_file(path)
        except SafetensorError as error:
            print(f"{path.name} cannot be read: {error}", file=sys.stderr)
            return 2
        for difference in differences:
            print(difference)
        failed = failed or bool(differences)
        print(f"{path.name}: {compared} tensors, {len(differences)} differ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
