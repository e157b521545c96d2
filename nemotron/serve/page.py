"""The chat page: one file of this package, which asks nothing of any other place."""

import base64
import functools
import hashlib
import re
from importlib import resources


@functools.cache
def page() -> tuple[str, str]:
    """Return the page, and the policy under which a browser runs its own script alone."""
    text = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    hashes = {kind: _hash(text, kind) for kind in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src '{hashes['script']}'; style-src '{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


def _hash(text: str, kind: str) -> str:
    found = re.search(f"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
    assert found is not None, f"the page has no {kind}"
    return "sha256-" + base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
