"""Files of a folder that may come from anybody: regular ones, inside it, of bounded size."""

from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import read_regular


def inside(path: Path) -> Path:
    """Return the path of a file after checking that it lies in its folder and is a regular one.

    A link may lead only into the hub cache that the folder belongs to.

    Raises:
        UserError: when it leads elsewhere, or is a folder, a device or a pipe.
    """
    home = path.parent.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        if not path.is_symlink():
            raise
        real = path.resolve()
    except (OSError, RuntimeError):
        raise UserError(
            "is a link that leads nowhere; copy the file there.", where=str(path)
        ) from None
    if real.parent not in allowed:
        raise UserError(
            "is a link that leads out of the folder; copy the file there.", where=str(path)
        )
    if not real.is_file():
        raise UserError("is not a regular file; put the file itself there.", where=str(path))
    return path


def read_inside(path: Path) -> bytes:
    """Return the content of a small file, checked as `inside` does.

    Raises:
        FileNotFoundError: when there is none.
        UserError: when it is not a regular file of the folder, or too large to be what it says.
    """
    return read_regular(inside(path))
