"""How code that a model wrote is run, and what it may use."""

from typing import Literal

from pydantic import Field

from nemotron.section import Section


class SandboxConfig(Section):
    """Isolation and limits of code that a model wrote."""

    kind: Literal["bwrap", "none"] = "bwrap"
    """bwrap: namespaces of its own by bubblewrap, or a refusal where there are none; none: a
    process of this machine, which can read and destroy whatever this user can, and has to be
    allowed by the environment (`NEMOTRON_ALLOW_UNSAFE_CODE=1`)."""
    time_s: float = Field(4.0, gt=0, le=600)
    """Seconds of one run, by the clock and of the processor."""
    total_s: float = Field(20.0, gt=0, le=3600)
    """Seconds of all runs of one program; those that come later are not started."""
    memory_mib: int = Field(1024, ge=64)
    """Address space of each process."""
    file_mib: int = Field(10, ge=1)
    """Size of each file."""
    disk_mib: int = Field(64, ge=1)
    """Size of all files together, which are kept in memory."""
    processes: int = Field(32, ge=4)
    """Processes and threads at the same time."""
    output_kib: int = Field(64, ge=1)
    """Size of each output; a program that writes more is ended."""
