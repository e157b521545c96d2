"""What a device reaches in matrix products and copies, measured once and kept in a file."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from nemotron.device import measure_matmul_peak, synchronize
from nemotron.errors import UserError
from nemotron.files import write_text
from nemotron.ops.registry import INT16
from nemotron.ops.tuning.base import user_folder
from nemotron.section import Section
from nemotron.sol.bound import Roofs

COPIED = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Bytes that are copied to measure memory: many times the caches."""
PROBED_S = 1.0
"""Seconds for each product."""
FP8_FROM = (8, 9)
"""Compute capability of the first GPUs that multiply FP8."""


class Machine(Section):
    """The roofs of a device with so many threads."""

    device: str
    threads: int = Field(gt=0)
    """Of PyTorch on a CPU; 1 on a GPU."""
    torch: str
    date: str
    bandwidth: float = Field(gt=0)
    """Bytes per second that a copy reads and writes."""
    peaks: dict[str, float]
    """FLOP/s of large products of random matrices, by dtype."""

    def roofs(self, dtype: str, backend: str) -> Roofs:
        """Return what bounds problems in a dtype.

        In 16-bit integers, an instruction takes twice as many products as in float32.
        """
        flops = 2 * self.peaks["float32"] if backend == INT16 else self.peaks[dtype]
        return Roofs(flops, self.bandwidth)

    @property
    def kind(self) -> tuple[str, int, str]:
        """What must be the same for a file to be of use."""
        return self.device, self.threads, self.torch


def device_name(device: torch.device) -> str:
    """Return the name that a vendor gave to a processor or an accelerator."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.M)
    return found[1] if found else "CPU"


def machine_file(device: torch.device) -> Path:
    """Return where the roofs of this device are kept, in the user's cache folder."""
    words = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return user_folder() / "machines" / f"{words}-{_threads(device)}.json"


def known_machine(device: torch.device) -> Machine:
    """Return the roofs in the file, or measure them and write it.

    Raises:
        UserError: when there is a file that is damaged.
    """
    path = machine_file(device)
    if path.exists():
        found = read(path)
        if found.kind == (device_name(device), _threads(device), torch.__version__):
            return found
    return write(probe(device), path)


def read(path: Path) -> Machine:
    """Read a file of roofs.

    Raises:
        UserError: when it is not one.
    """
    try:
        return Machine.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot be read ({problem}).", where=str(path)) from None
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        rule = f"{where}: {first['msg']}; delete the file, it is measured again."
        raise UserError(rule, where=str(path)) from None


def write(machine: Machine, path: Path) -> Machine:
    """Keep roofs in a file, and return them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, machine.model_dump_json(indent=2) + "\n")
    return machine


def probe(device: torch.device, seconds: float = PROBED_S) -> Machine:
    """Measure a device; takes a few seconds, in which other programs should rest."""
    peaks = {
        name: measure_matmul_peak(device, dtype, seconds)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_FROM:
        peaks["float8_e4m3fn"] = _fp8_peak(device)
    return Machine(
        device=device_name(device),
        threads=_threads(device),
        torch=torch.__version__,
        date=datetime.now(UTC).date().isoformat(),
        bandwidth=_copy_rate(device),
        peaks=peaks,
    )


def _threads(device: torch.device) -> int:
    return torch.get_num_threads() if device.type == "cpu" else 1


def _copy_rate(device: torch.device) -> float:
    size = COPIED[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def _fp8_peak(device: torch.device, size: int = 8192) -> float:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device) for _ in range(2))
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T.contiguous().T
    one = torch.ones((), device=device)
    kind = torch.bfloat16
    seconds = _fastest(lambda: torch._scaled_mm(x, y, one, one, out_dtype=kind), device)
    return 2.0 * size**3 / seconds


def _fastest(work: Callable[[], Tensor], device: torch.device, repetitions: int = 7) -> float:
    """Return the least seconds: other programs only slow a device down."""
    times = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
