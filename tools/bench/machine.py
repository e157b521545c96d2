"""The machine under a benchmark: who else is busy on it, and how fast it multiplies matrices."""

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from nemotron.device import cpu_multiplies_bfloat16
from nemotron.sol.clock import Watch


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> tuple[float, float]:
    """Return the best FLOP/s of a square product over two seconds, and the others' share then.

    bfloat16 is float32 where this CPU has no instructions for it, as in `float32_products`.
    """
    if dtype == torch.bfloat16 and not cpu_multiplies_bfloat16():
        dtype = torch.float32
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, others = 0.0, 1.0
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        with Watch() as watch:
            torch.mm(a, b)
        best, others = max((best, others), (2 * size**3 / watch.seconds, watch.others))
    return best, others


def describe() -> dict[str, object]:
    """Name processor, memory, versions and commit, for the line that `--json` appends."""
    import transformers

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False).stdout
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    return {
        "commit": commit.strip() or None,
        "uncommitted_changes": bool(changed.strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
    }
