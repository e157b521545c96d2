"""Follow one batch from the recipe to the matrix products and say what it passed.

    python tools/trace_batch.py [RECIPE] [KEY=VALUE ...]

Runs one optimizer step of the recipe in a temporary folder and prints, in order, each file of the
package in which something ran while the recipe was read or the step was made, with the functions
and the lines on which they begin; a star marks those that a person reads to understand the step.
Then the calls from the step to a matrix product, and the totals beside their targets. Frames of
PyTorch are not counted.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from nemotron import cli
from nemotron.data.loader import TextBatches
from nemotron.model.block import Block
from nemotron.model.config import LAYER_KINDS
from nemotron.recipe.load import load_recipe
from nemotron.train.loop import loop
from nemotron.train.trainer import Trainer

ROOT = Path(__file__).parents[1]
PACKAGE = f"{ROOT / 'nemotron'}/"
DEFAULT = ROOT / "recipes/tiny/smoke.yaml"

ENTRANCES = (load_recipe.__code__, TextBatches.take.__code__, Trainer.update.__code__)
"""Where a batch's way begins: its recipe is read, its rows are read, the step is made."""

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm")
"""Operations of PyTorch that multiply matrices, those inside its fused attention apart."""

READ = (
    "cli.py",
    "recipe/load.py",
    "train/start.py",
    "train/loop.py",
    "data/loader.py",
    "data/batch.py",
    "train/trainer.py",
    "model/hybrid.py",
    "model/block.py",
    "model/mamba2.py",
    "ops/ssd/__init__.py",
    "train/loss.py",
    "train/optimizer.py",
)
"""What a person opens to understand the step, with one mixer and one operation for all."""

READ_FILES, READ_LINES, RAN_FILES = 13, 2750, 46
"""Most files and lines to read, and most files in which anything runs."""
STEP_CALLS, PROJECTION_CALLS, KERNEL_CALLS = 2, 6, 9
"""Most calls from the loop to the step, and from there to a projection or another product."""


@dataclass
class Trace:
    """What one batch passed."""

    functions: dict[Path, dict[str, int]] = field(default_factory=dict)
    """For each file, in order: the functions that ran and the lines on which they begin."""
    layers: dict[Path, set[str]] = field(default_factory=dict)
    """For each file: the layer kinds inside which it ran; empty text means outside of all."""
    step_calls: int = 0
    """Calls from the loop to the step."""
    chains: Counter[tuple[str, ...]] = field(default_factory=Counter)
    """Calls from the step to a matrix product, and how often they were made going forward."""

    def files(self, kind: str | None = None) -> list[Path]:
        """Return the files of the whole path, or of the one through a single kind of layer."""
        return [f for f, kinds in self.layers.items() if kind is None or kinds & {kind, ""}]


class Recorder:
    """Notes the package's calls while the recipe is read and the step is made."""

    def __init__(self) -> None:
        self.trace = Trace()
        self._open: list[CodeType] = []
        self._kinds: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return
        if event == "call":
            if code in ENTRANCES:
                self._open.append(code)
                outside = package_frames(frame)
                for outer in reversed(outside):
                    self._note(outer)
                codes = [outer.f_code for outer in outside]
                if code is Trainer.update.__code__ and loop.__code__ in codes:
                    self.trace.step_calls = codes.index(loop.__code__)
            if code is Block.forward.__code__:
                self._kinds.append(kind_of(frame.f_locals["self"]))
            if self._open:
                self._note(frame)
        elif event == "return":
            if code is Block.forward.__code__:
                self._kinds.pop()
            if self._open and code is self._open[-1]:
                self._open.pop()

    def _note(self, frame: FrameType) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        functions = self.trace.functions.setdefault(path, {})
        if "<" not in code.co_name:  # comprehensions belong to the function around them
            functions.setdefault(code.co_qualname, code.co_firstlineno)
        kinds = self.trace.layers.setdefault(path, set())
        if self._kinds:
            kinds.add(self._kinds[-1])
        # going backward, autograd calls: the layer is not around it, and its file is known already
        elif not any(outer.f_code.co_name == "backward" for outer in package_frames(frame)):
            kinds.add("")


class ProductSpy(TorchDispatchMode):
    """Notes how each matrix product of the forward pass is reached from the step."""

    def __init__(self, chains: Counter[tuple[str, ...]]) -> None:
        super().__init__()
        self._chains = chains

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: as PyTorch declares it
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            codes = [frame.f_code for frame in package_frames(sys._getframe())]
            step = Trainer.update.__code__
            # going backward, autograd calls: the stack says nothing of the path that was taken
            if step in codes[1:] and not any(code.co_name == "backward" for code in codes):
                inner = reversed(codes[: codes.index(step) + 1])
                self._chains[(*(code.co_qualname for code in inner), name)] += 1
        return func(*args, **(kwargs or {}))


def package_frames(frame: FrameType | None) -> list[FrameType]:
    """Return the frames of the package around and including this one, innermost first."""
    frames = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE) and "<" not in code.co_name:
            frames.append(frame)
        frame = frame.f_back
    return frames


def kind_of(block: Block) -> str:
    """Return the layer kind of a block."""
    kinds = {"Mamba2": "mamba", "Attention": "attention", "MoE": "moe", "MLP": "mlp"}
    return kinds[type(block.mixer).__name__]


def trace(recipe: Path, overrides: list[str]) -> Trace:
    """Run one step of the recipe, in a folder that is removed afterwards, and follow its batch.

    Raises:
        SystemExit: when the step could not be made, with what the command line said.
    """
    recorder = Recorder()
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"output={folder}/runs",
            f"data.cache={folder}/data",
            "device=cpu",
            "data.prefetch_steps=0",
        ]
        words = ["train", str(recipe), *overrides, *own, "--stop-at", "1"]
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            ProductSpy(recorder.trace.chains),
        ):
            sys.setprofile(recorder)
            try:
                code = cli.run(words)
            finally:
                sys.setprofile(None)
    if code not in (0, 75):
        raise SystemExit(printed.getvalue())
    return recorder.trace


def num_lines(files: list[Path]) -> int:
    """Count the lines of whole files."""
    return sum(len(path.read_text().splitlines()) for path in files)


def report(found: Trace) -> str:
    """Return what was found as text."""
    lines = ["files, in the order in which the batch meets them"]
    for number, (path, functions) in enumerate(found.functions.items(), 1):
        names = ", ".join(f"{name}:{line}" for name, line in functions.items())
        where, star = path.relative_to(ROOT), "*" if path in read(found) else " "
        lines.append(f"{number:4} {star} {num_lines([path]):4} lines  {where}  {names}")
    lines += ["", "from the step to a matrix product, going forward"]
    for chain, times in sorted(found.chains.items(), key=lambda item: -len(item[0])):
        lines.append(f"{len(chain) - 1:4} calls {times:4} x  {' > '.join(chain)}")
    lines += ["", f"{'':24}{'files':>8}{'lines':>8}"]
    parts = {"all": found.files()}
    for folder in dict.fromkeys(path.relative_to(PACKAGE).parts[0] for path in found.files()):
        inside = [path for path in found.files() if path.relative_to(PACKAGE).parts[0] == folder]
        parts[f"  {folder}"] = inside
    for kind in LAYER_KINDS.values():
        if any(kind in kinds for kinds in found.layers.values()):
            parts[f"all, {kind} layers only"] = found.files(kind)
    lines += [f"{part:24}{len(files):8}{num_lines(files):8,}" for part, files in parts.items()]
    lines += ["", f"{'':24}{'files':>8}{'target':>8}{'lines':>8}{'target':>8}"]
    for name, files, targets in (
        ("read", read(found), (f"{READ_FILES}", f"{READ_LINES:,}")),
        ("ran", found.files(), (f"{RAN_FILES}", "")),
    ):
        most_files, most_lines = targets
        lines.append(
            f"{name:24}{len(files):8}{most_files:>8}{num_lines(files):8,}{most_lines:>8}".rstrip()
        )
    lines += ["", f"{'':40}{'calls':>8}{'target':>8}"]
    for name, calls, most in (
        ("from the loop to the step", found.step_calls, STEP_CALLS),
        ("to a projection of the trunk, at most", longest(found, True), PROJECTION_CALLS),
        ("to any other product there, at most", longest(found, False), KERNEL_CALLS),
    ):
        lines.append(f"{name:40}{calls:8}{most:8}")
    return "\n".join(lines)


def read(found: Trace) -> list[Path]:
    """Return the files to read that the batch met, in the order of `READ`."""
    return [path for name in READ if (path := Path(PACKAGE) / name) in found.functions]


def longest(found: Trace, is_projection: bool) -> int:
    """Return the most calls from the step to a product of the trunk, by a `Linear` or not."""
    trunk = (chain for chain in found.chains if "HybridLM.forward" in chain)
    return max(len(c) - 1 for c in trunk if ("Linear.forward" in c) == is_projection)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("words", nargs="*", metavar="[RECIPE] [KEY=VALUE ...]")
    recipe, overrides = DEFAULT, parser.parse_args(arguments).words
    if overrides and "=" not in overrides[0]:
        recipe, overrides = Path(overrides[0]), overrides[1:]
    print(report(trace(recipe, overrides)))


if __name__ == "__main__":
    main(sys.argv[1:])
