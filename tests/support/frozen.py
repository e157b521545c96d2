"""Imported last before processes are forked: what each would do again is done once.

It imports the whole package, builds the command line and measures the core, which takes a second
of computing. And no collection of garbage visits what is imported: each would take 0.2 s of a core
in each process, and copy the pages that it visits.
"""

import contextlib
import gc
import importlib
import pkgutil

import torch

import nemotron
from nemotron.cli import command_line
from nemotron.device import matmul_peak
from nemotron.ops.jit import storage

BARRED = ("nemotron.__main__", "nemotron.evaluate.harness")
"""The start of the program, and what imports lm-eval, which no forked process uses."""

for module in pkgutil.walk_packages(nemotron.__path__, "nemotron."):
    if module.name not in BARRED:
        # kernels that are kept must be found: numba asks where while they are imported
        load = storage.load if "kernels" in module.name.split(".") else importlib.import_module
        with contextlib.suppress(ImportError):  # of packages that only some runs need
            load(module.name)
command_line()
matmul_peak(torch.device("cpu"), torch.float32)
gc.collect()
gc.freeze()
