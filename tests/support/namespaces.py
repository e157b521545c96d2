"""Whether this machine lets bubblewrap make namespaces, asked without our own command line."""

import os
import shutil
import subprocess

import pytest

from nemotron.posttrain.sandbox.bwrap import NOBODY


def why_not() -> str:
    """Return why there can be no sandbox here; empty if there can, whatever ours does."""
    program = shutil.which("bwrap")
    if program is None:
        return "bubblewrap is not installed"
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    words = [program, "--unshare-all", "--ro-bind", "/", "/", "/bin/true"]
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=20, **user)
    return "" if done.returncode == 0 else f"bubblewrap cannot isolate: {done.stderr.strip()}"


isolated = pytest.mark.skipif(bool(why_not()), reason=f"no sandbox: {why_not()}")
