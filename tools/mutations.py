"""Plant faults in a copy of the tree, one after the other: the tests must notice each.

A fault is a replacement of text that must be there exactly once, so the table says by itself when
the code has moved on. The tests of a fault are those of the file that it is in.

    python tools/mutations.py
    python tools/mutations.py --only parallel
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

PASSED, FAILED = 0, 1
"""Exit codes of pytest; all others mean that it could not run the tests."""


@dataclass(frozen=True)
class Fault:
    """A wrong line, and the tests that should notice it."""

    what: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "model: the router's bias weighs, too, instead of choosing only",
        "nemotron/ops/routing/__init__.py",
        "weights = scores.gather(1, experts)",
        "weights = (scores + bias).gather(1, experts)",
        "tests/model/test_router.py",
    ),
    Fault(
        "model: further prediction joins hidden state and embedding the wrong way round",
        "nemotron/model/hybrid.py",
        'torch.cat([part("enorm")(embedding), part("hnorm")(hidden)], dim=-1)',
        'torch.cat([part("hnorm")(hidden), part("enorm")(embedding)], dim=-1)',
        "tests/model/test_mtp.py",
    ),
    Fault(
        "ops: the state of a document decays into the next one",
        "nemotron/ops/ssd/chunked.py",
        "into *= torch.eq(ids, before[:, :, None]).unsqueeze(-1)",
        "into *= 1",
        "tests/ops/test_ssd.py",
    ),
    Fault(
        "ops: the weights of labels do not reach the gradient",
        "nemotron/ops/linear_cross_entropy/__init__.py",
        "slope *= share",
        "slope *= 1",
        "tests/ops/test_linear_cross_entropy.py",
    ),
    Fault(
        "train: the learning rate is one step late",
        "nemotron/train/schedule.py",
        "self.timeline.tokens_before(step) + self.timeline.tokens_per_step(step)",
        "self.timeline.tokens_before(step)",
        "tests/train/test_schedule.py",
    ),
    Fault(
        "train: norms and biases are decayed",
        "nemotron/train/optimizer.py",
        'return parameter.ndim > 1 and not name.endswith(".bias")',
        'return not name.endswith(".bias")',
        "tests/train/test_optimizer.py",
    ),
    Fault(
        "parallel: a gather's gradient leaves out the parts of other ranks",
        "nemotron/parallel/collectives.py",
        "return scatter_sum(grad, ctx.dim, ctx.group), None, None",
        "return grad.chunk(dist.get_world_size(ctx.group), ctx.dim)"
        "[dist.get_rank(ctx.group)], None, None",
        "tests/parallel/test_collectives.py",
    ),
    Fault(
        "parallel: the state of a document is passed on to the next rank's",
        "nemotron/parallel/context/state_passing.py",
        "decay = decay * (ids == window_ids[:, before - 1, None]).unsqueeze(-1)",
        "decay = decay * 1",
        "tests/parallel/test_context_mamba.py",
    ),
    Fault(
        "parallel: the copies of a tied table drift apart",
        "nemotron/parallel/pipeline.py",
        "dist.all_reduce(local_of(parameter.grad), group=group)",
        "parameter.grad.add_(0)",
        "tests/parallel/test_pipeline_step.py",
    ),
    Fault(
        "precision: the last bit of NVFP4's global scale",
        "nemotron/precision/nvfp4.py",
        "encode * _reciprocal(E2M1_MAX)",
        "encode / E2M1_MAX",
        "tests/precision/test_golden.py",
    ),
    Fault(
        "precision: a rank's columns get the random bits of the first ones",
        "nemotron/precision/random_bits.py",
        "calls + self.columns // BYTES",
        "calls",
        "tests/precision/test_random_bits.py",
    ),
    Fault(
        "data: a token is lost where a long document is cut",
        "nemotron/data/packing.py",
        "step = capacity - 1",
        "step = capacity",
        "tests/data/test_packing.py",
    ),
    Fault(
        "data: a source begins anew in each phase",
        "nemotron/data/mixture.py",
        "source.place(self.first_rows[number] + index)",
        "source.place(index)",
        "tests/data/test_phases.py",
    ),
    Fault(
        "checkpoint: damaged ones count among those that are kept",
        "nemotron/checkpoint/housekeeping.py",
        "        except DamagedCheckpoint:\n            continue\n        kept += 1",
        "        except DamagedCheckpoint:\n            pass\n        kept += 1",
        "tests/checkpoint/test_checkpoint.py",
    ),
    Fault(
        "checkpoint: the content of a file is not compared with its hash",
        "nemotron/checkpoint/manifest.py",
        "hash_file(path) != expected.xxh128",
        "not expected.xxh128",
        "tests/checkpoint/test_checkpoint.py",
    ),
    Fault(
        "hf: the correction bias is rounded to bfloat16",
        "nemotron/hf/formats.py",
        'RELEASED = Formats((("e_score_correction_bias", F32),))',
        "RELEASED = Formats(())",
        "tests/hf/test_names.py",
    ),
    Fault(
        "hf: shards grow beyond their limit",
        "nemotron/hf/shards.py",
        "size += parameter.num_bytes",
        "size = parameter.num_bytes",
        "tests/hf/test_shards.py",
    ),
    Fault(
        "hf: a file that was cut short is read",
        "nemotron/hf/shards.py",
        "if size != end:",
        "if size > end:",
        "tests/hf/test_shards.py",
    ),
    Fault(
        "generate: two samples of one prompt are the same",
        "nemotron/generate/request.py",
        "copies[prompt] += 1",
        "copies[prompt] += 0",
        "tests/generate/test_scheduling.py",
    ),
    Fault(
        "generate: the temperature sharpens by its square",
        "nemotron/generate/sampling.py",
        "(logits - logits.amax(-1, keepdim=True)) / sampling.temperature",
        "(logits - logits.amax(-1, keepdim=True)) / sampling.temperature**2",
        "tests/generate/test_sampling.py",
    ),
    Fault(
        "recipe: a mapping replaces the one of the base instead of being merged",
        "nemotron/recipe/load.py",
        "if isinstance(old, dict) and isinstance(value, dict):",
        "if old is value:",
        "tests/recipe/test_recipe.py",
    ),
)


@dataclass(frozen=True)
class Run:
    """What pytest did."""

    code: int
    output: str
    seconds: float

    @property
    def verdict(self) -> str:
        """Say whether a test noticed, and which one."""
        if self.code == FAILED:
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", self.output, re.MULTILINE)
            return f"noticed by {failed[1].rpartition('::')[2]}" if failed else "noticed"
        return "NOT NOTICED" if self.code == PASSED else f"NOT RUN (pytest ended with {self.code})"


def main() -> int:
    """Print a line for each fault; returns 0 when all were noticed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose line contains this text")
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout to look at")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only in fault.what]
    with tempfile.TemporaryDirectory() as folder:
        scratch = copy_tree(options.tree.resolve(), Path(folder) / "tree")
        tests = sorted({path for fault in faults for path in fault.tests.split()})
        if (run := run_tests(scratch, tests)).code != PASSED:
            print(f"{run.output}\nwithout a fault the tests must pass")
            return 1
        print(f"{run.seconds:5.0f} s  no fault: {len(tests)} files of tests pass", flush=True)
        missed = sum(try_fault(scratch, fault) for fault in faults)
    print(f"{len(faults) - missed} of {len(faults)} faults were noticed")
    return 1 if missed else 0


def copy_tree(tree: Path, target: Path) -> Path:
    """Copy the files that git knows or does not ignore, as they are."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=tree, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (tree / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(tree / name, target / name)
    return target


def try_fault(scratch: Path, fault: Fault) -> bool:
    """Plant a fault, run its tests, undo it; returns whether nothing was noticed."""
    path = scratch / fault.file
    right = path.read_text()
    count = right.count(fault.old)
    assert count == 1, f"{fault.file} contains {count} times: {fault.old}"
    try:
        path.write_text(right.replace(fault.old, fault.new))
        run = run_tests(scratch, fault.tests.split())
    finally:
        path.write_text(right)
    print(f"{run.seconds:5.0f} s  {fault.what}: {run.verdict}", flush=True)
    return run.code != FAILED


def run_tests(scratch: Path, tests: list[str]) -> Run:
    """Run tests in the copy, up to the first that fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(scratch)}
    begin = time.monotonic()
    done = subprocess.run(
        command, cwd=scratch, env=environment, capture_output=True, text=True, check=False
    )
    return Run(done.returncode, done.stdout + done.stderr, time.monotonic() - begin)


if __name__ == "__main__":
    sys.exit(main())
