"""The scan beside mamba-ssm's own PyTorch references, read from its sources without its kernels.

The sources import Triton at the top; it is replaced by a stand-in, because the references use none.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from against_reference import doubled, results, worst
from test_ssd import draw
from torch import Tensor

from nemotron.ops.ssd import chunked

Reference = Callable[..., Tensor]


def find_sources() -> Path:
    """Return the folder `mamba_ssm`: unpacked by the set-up, or installed."""
    unpacked = Path(sys.prefix) / "references" / "mamba_ssm"
    if unpacked.is_dir():
        return unpacked
    installed = importlib.util.find_spec("mamba_ssm")
    if installed is None or installed.submodule_search_locations is None:
        pytest.skip(f"mamba-ssm's sources are not in {unpacked}; tools/setup.sh puts them there")
    return Path(installed.submodule_search_locations[0])


def package(name: str, folder: Path) -> types.ModuleType:
    """Return a package that only finds modules, without running its `__init__`."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    return module


@pytest.fixture(scope="module")
def mamba_ssm() -> Iterator[Callable[[str], types.ModuleType]]:
    """Import modules of mamba-ssm by name."""
    sources = find_sources()
    triton = MagicMock(__version__="3.5.0")
    # the modules look at their kernels' settings when they are imported
    triton.Config = lambda values, **options: types.SimpleNamespace(kwargs=values, **options)
    triton.autotune = lambda configs, **_: lambda _: types.SimpleNamespace(configs=configs)
    stands_in = {
        "triton": triton,
        "triton.language": triton.language,
        **{f"mamba_ssm{n}": package(f"mamba_ssm{n}", sources / n[1:].replace(".", "/"))
           for n in ("", ".modules", ".ops", ".ops.triton", ".utils")},
        "causal_conv1d": None,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        # torch's deterministic mode would make it choose among the kernels' settings
        patch.setenv("MAMBA_DETERMINISTIC", "0")
        # einops takes a left-over of a package that is not installed for the package
        patch.delitem(sys.modules, "mlx", raising=False)
        for name, module in stands_in.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module
        for name in [n for n in sys.modules if n.startswith("mamba_ssm")]:
            patch.delitem(sys.modules, name)


def ours(*inputs: Tensor) -> Tensor:
    return chunked.ssd(*inputs, None, None)[0]


@pytest.mark.parametrize("length", [64, 192])
def test_the_listing_of_the_paper_agrees(mamba_ssm, length: int):
    minimal = mamba_ssm("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (B, C))
        y, _ = minimal(x * dt[..., None], dt * A, B, C, 32)
        return y + D[:, None] * x

    check(theirs, length)


@pytest.mark.parametrize(("length", "chunk"), [(64, 32), (192, 16), (77, 11), (1, 1)])
def test_the_reference_beside_the_kernels_agrees(mamba_ssm, length: int, chunk: int):
    combined = mamba_ssm("mamba_ssm.ops.triton.ssd_combined").ssd_chunk_scan_combined_ref

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return combined(x, dt, A, B, C, chunk, D=D)

    check(theirs, length, rounds_dt=True)


def check(theirs: Reference, length: int, rounds_dt: bool = False) -> None:
    """Compare output and all gradients in both widths with theirs in float64."""
    inputs = draw(2, length, seed=length)[:6]
    inputs[1] *= 0.05  # the gradient of theirs is NaN where a decay over the whole row overflows
    exact = results(theirs, doubled(inputs))
    found = results(ours, doubled(inputs))
    if rounds_dt:  # a cast of theirs to float32 rounds this gradient, and no other
        assert worst([found.pop(2)], [exact[2]]) <= 2**-23
    assert worst(found, [*exact[:2], *exact[3:]] if rounds_dt else exact) <= 1e-12
    assert worst(results(ours, inputs), exact) <= 1e-5


@pytest.mark.parametrize("steps", [1, 9])
def test_token_by_token_updates_agree(mamba_ssm, steps: int):
    update = mamba_ssm("mamba_ssm.ops.triton.selective_state_update").selective_state_update_ref
    x, dt, A, B, C, D, state = doubled(draw(2, steps))
    y, final = chunked.ssd(x, dt, A, B, C, D, state, None)
    theirs = state.clone()
    for t in range(steps):
        width, size = x.shape[3], B.shape[3]
        y_t = update(
            theirs,
            x[:, t],
            dt[:, t, :, None].expand(-1, -1, width),
            A[:, None, None].expand(-1, width, size),
            B[:, t],
            C[:, t],
            D[:, None].expand(-1, width),
        )
        assert worst([y[:, t]], [y_t]) <= 1e-12
    assert worst([final], [theirs]) <= 1e-12
