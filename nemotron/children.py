"""Starting Python without modules of the current folder, where a user's data may lie.

A file `random.py` beside the data would otherwise run in place of Python's own module.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
"""The folder that holds this package."""


def leave_current_folder() -> None:
    """Take the current folder out of this process's search for modules, and its children's.

    `python -m` puts it first. Where this package lies in it, it comes last: what is installed, and
    Python itself, go before.
    """
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    os.environ["PYTHONSAFEPATH"] = "1"
    if ROOT not in sys.path:
        sys.path.append(ROOT)


def module_command(module: str) -> list[str]:
    """Return the command that runs a module of this package, as `python -m` would."""
    program = f"""import sys; sys.path.append({ROOT!r})
import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"""
    return [sys.executable, "-P", "-c", program]
