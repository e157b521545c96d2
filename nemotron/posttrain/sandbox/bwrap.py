"""The command line of bubblewrap, and whether it isolates on this machine."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemotron.posttrain.sandbox.config import SandboxConfig

NOBODY = 65534
"""The user who runs the sandbox when this process is root."""
SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/sbin")
INSTALL = "apt-get install bubblewrap (Debian, Ubuntu) or dnf install bubblewrap (Fedora, RHEL)"
PROBE_S = 20


@dataclass(frozen=True)
class Isolation:
    """What isolates on this machine."""

    program: str
    """Path of bubblewrap."""
    python: str
    """The interpreter that runs inside."""
    user: int | None
    """Another user to become first; absent: this one."""


def command(isolation: Isolation, config: SandboxConfig, seccomp: int | None) -> list[str]:
    """Return the words that start something inside of a sandbox.

    It sees the system's programs and libraries, and a scratch folder in memory; no network, no
    processes but its own, no files of users, nothing of the environment.
    """
    words = [isolation.program, "--unshare-all", "--unshare-user", "--disable-userns"]
    words += ["--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"]
    words += ["--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp"]
    words += ["--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONDONTWRITEBYTECODE", "1"]
    words += ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, SYSTEM):
        if path.is_symlink():
            words += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            words += ["--ro-bind", str(path), str(path)]
    prefix = Path(isolation.python).parents[1]
    if not prefix.is_relative_to("/usr"):
        words += ["--ro-bind", str(prefix), str(prefix)]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(2**20), "--tmpfs", "/dev/shm"]
    words += ["--size", str(config.disk_mib * 2**20), "--tmpfs", "/tmp"]
    # the folders that bubblewrap made are in memory too, and have no limit of size
    words += ["--remount-ro", "/", "--remount-ro", "/dev", "--chdir", "/tmp"]
    if seccomp is not None:
        words += ["--seccomp", str(seccomp)]
    return words


@cache
def find_isolation() -> Isolation | str:
    """Return what isolates here, or the reason why nothing does."""
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces; run code environments on Linux"
    program = shutil.which("bwrap")
    if program is None:
        return f"bubblewrap is not installed; install it with: {INSTALL}"
    user = NOBODY if os.geteuid() == 0 else None
    python = next((path for path in _interpreters() if _can_run(path, user)), None)
    if python is None:
        return (
            "the unprivileged user of the sandbox can run no Python interpreter; "
            "install one in /usr/bin: apt-get install python3"
        )
    isolation = Isolation(program, python, user)
    words = [*command(isolation, SandboxConfig(), None), python, "-I", "-S", "-c", "print(7)"]
    done = _run(words, user)
    if done.returncode != 0 or done.stdout != "7\n":
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"status {done.returncode}"
        return (
            f"bubblewrap cannot isolate ({reason}); allow namespaces of unprivileged users: "
            "sysctl kernel.unprivileged_userns_clone=1, in a container with --security-opt "
            "seccomp=unconfined; bubblewrap must be 0.8 or later"
        )
    return isolation


def _interpreters() -> list[str]:
    own = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return [str(own), "/usr/bin/python3"]


def _can_run(path: str, user: int | None) -> bool:
    try:
        return _run([path, "-I", "-S", "-c", "pass"], user).returncode == 0
    except OSError:
        return False


def _run(words: list[str], user: int | None) -> "subprocess.CompletedProcess[str]":
    extra: dict[str, Any] = {}
    if user is not None:
        extra = {"user": user, "group": user, "extra_groups": []}
    return subprocess.run(
        words, capture_output=True, text=True, timeout=PROBE_S, cwd="/", env={}, **extra
    )
