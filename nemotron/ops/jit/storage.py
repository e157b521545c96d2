"""Where compiled kernels are kept, so that only the first process of a machine compiles them."""

import functools
import hashlib
import importlib
import logging
import os
import tempfile
from pathlib import Path
from types import ModuleType

from nemotron.ops.tuning.base import user_folder

log = logging.getLogger(__name__)


@functools.cache
def folder() -> Path:
    """Return where this version of the kernels is kept: in the user's cache folder.

    numba does not notice a change of a file other than the one of the outermost function, so what
    all were compiled from and for names the folder. XDG_CACHE_HOME may place it elsewhere; where
    nothing can be written, or others could have, the kernels are compiled for this process alone:
    numba unpickles what it finds.
    """
    from llvmlite.binding import get_host_cpu_name
    from numba import __version__

    digest = hashlib.sha256(f"{__version__} {get_host_cpu_name()}".encode())
    operations = Path(__file__).parents[1]
    for pattern in ("jit/*.py", "*/*kernels.py", "*/kernels/*.py"):
        for path in sorted(operations.glob(pattern)):
            digest.update(path.read_bytes())
    found = user_folder() / "kernels" / digest.hexdigest()[:16]
    try:
        found.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found.mkdir(mode=0o700, exist_ok=True)
        for place in (found.parent, found):
            _check_own(place)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as problem:
        log.warning("compiled kernels cannot be kept: %s", problem)
        return Path(tempfile.mkdtemp())


def _check_own(place: Path) -> None:
    """Raise PermissionError for a folder into which another user can write."""
    known = place.lstat()
    if known.st_uid != os.getuid() or known.st_mode & 0o022 or place.is_symlink():
        raise PermissionError(f"{place} is not a folder that this user alone can write to")


def load(name: str) -> ModuleType:
    """Import a module of kernels; numba looks for its folder only while a function is defined."""
    from numba.core import config

    before, config.CACHE_DIR = config.CACHE_DIR, str(folder())
    try:
        return importlib.import_module(name)
    finally:
        config.CACHE_DIR = before


def announce(name: str, what: str, seconds: int) -> Path:
    """Say that kernels are compiled now, unless they are kept; touch the result when they are."""
    mark = folder() / f"{name}.compiled"
    if not mark.exists():
        log.warning(
            "%s are compiled now, about %d s of a core, and kept in %s", what, seconds, folder()
        )
    return mark
