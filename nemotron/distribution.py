"""Other distributions that bring a package of this name, whose files may have replaced ours."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

OURS = "nemotron_train"
PACKAGE = re.compile(r"^nemotron/", re.MULTILINE)


def other_owners() -> Iterator[str]:
    """Yield names and versions of installed distributions that hold `nemotron/`, but for ours.

    Looked at are those whose names begin like the package, which takes a millisecond.
    """
    for entry in dict.fromkeys(sys.path):
        for folder in sorted(Path(entry or ".").glob("nemotron*.dist-info")):
            name, _, version = folder.name.removesuffix(".dist-info").partition("-")
            try:
                record = (folder / "RECORD").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            if name != OURS and PACKAGE.search(record):
                yield f"{name} {version}"
