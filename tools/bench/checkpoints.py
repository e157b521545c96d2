"""Time saving and loading of checkpoints, beside torch's distributed checkpoint.

python tools/bench/checkpoints.py [--mib 400] [--repetitions 5] [--folder DIR]

Both write the same tensors, sync them to the disk and hash them; both compare the hashes and read
every tensor into memory that exists already. The forms alternate; medians and ratios are printed.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from nemotron.checkpoint.find import newest
from nemotron.checkpoint.manifest import describe_file
from nemotron.checkpoint.read import SavedTensors
from nemotron.checkpoint.state import SavedState
from nemotron.checkpoint.write import Content, save
from nemotron.model.config import ModelConfig

CONFIG = ModelConfig(vocab_size=11, hidden_size=5, hybrid_override_pattern="M", n_groups=2)


def main() -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=400, help="size of all tensors")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    tensors = make_tensors(options.mib)
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    seconds: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        for number in range(options.repetitions):
            for form, (write, read) in FORMS.items():
                folder = Path(temporary) / f"{form}-{number}"
                folder.mkdir()
                for what, act, given in (("save", write, tensors), ("load", read, into)):
                    start = time.perf_counter()
                    act(folder, given)
                    seconds.setdefault(f"{what} {form}", []).append(time.perf_counter() - start)
                assert all(torch.equal(into[name], tensors[name]) for name in tensors)
                for tensor in into.values():
                    tensor.zero_()
                sizes[form] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    report(seconds, sizes)
    return 0


def make_tensors(mib: int) -> dict[str, Tensor]:
    """Return matrices of 8 MiB, and four vectors for each, as a model has."""
    tensors = {}
    for number in range(max(1, mib // 8)):
        tensors[f"layers.{number}.weight"] = torch.randn(1024, 2048)
        tensors |= {f"layers.{number}.vector{i}": torch.randn(1024) for i in range(4)}
    return tensors


def write_own(folder: Path, tensors: dict[str, Tensor]) -> None:
    save(folder, Content(1, tensors, SavedState(), CONFIG), keep=2)


def read_own(folder: Path, into: dict[str, Tensor]) -> None:
    info = newest(folder).info
    assert info is not None
    SavedTensors(info).load(into)


def write_torch(folder: Path, tensors: dict[str, Tensor]) -> None:
    writer = dcp.FileSystemWriter(str(folder), sync_files=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    for path in folder.iterdir():
        describe_file(path)


def read_torch(folder: Path, into: dict[str, Tensor]) -> None:
    for path in folder.iterdir():
        describe_file(path)
    dcp.load(into, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)


Act = Callable[[Path, dict[str, Tensor]], None]
FORMS: dict[str, tuple[Act, Act]] = {
    "torch": (write_torch, read_torch),
    "own": (write_own, read_own),
}


def report(seconds: dict[str, list[float]], sizes: dict[str, int]) -> None:
    """Print medians, sizes and ratios."""
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    for what in ("save", "load"):
        own, other = medians[f"{what} own"], medians[f"{what} torch"]
        print(f"{what}  own {own:.3f} s  torch {other:.3f} s  ratio {own / other:.2f}")
    ratio = sizes["own"] / sizes["torch"]
    print(f"size  own {sizes['own']:,}  torch {sizes['torch']:,} bytes  ratio {ratio:.4f}")


if __name__ == "__main__":
    sys.exit(main())
