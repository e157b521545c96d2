"""The text that ships with the package."""

import hashlib
import json
import lzma
from pathlib import Path

from nemotron.errors import UserError

EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the archives, the tokenizer, their manifest and their licenses."""


def corpus_hash(domain: str) -> str:
    """Return the SHA-256 of a domain's text, as the manifest has it."""
    manifest = json.loads((EMBEDDED / "manifest.json").read_text())
    return str(manifest["sha256"][f"{domain}.jsonl"])


def load_documents(domain: str) -> list[str]:
    """Return the documents of a domain of the embedded corpus.

    Raises:
        UserError: when the installed file is not the one that was shipped.
    """
    path = EMBEDDED / f"{domain}.jsonl.xz"
    try:
        content = lzma.decompress(path.read_bytes())
    except (lzma.LZMAError, EOFError, FileNotFoundError):
        content = b""
    if hashlib.sha256(content).hexdigest() != corpus_hash(domain):
        raise UserError(
            "is damaged: the hash of its text is wrong; reinstall the package.", where=str(path)
        )
    return [json.loads(line)["text"] for line in content.splitlines()]
