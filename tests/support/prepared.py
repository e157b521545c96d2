"""Prepared folders of text that a test has at hand."""

from collections.abc import Iterable
from pathlib import Path

from nemotron.data.prepare.assemble import assemble
from nemotron.data.prepare.encode import Ids
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.unit import Tally, write_documents, write_texts
from nemotron.data.tokenizer import load_tokenizer


def write_prepared(
    texts: Iterable[str], folder: Path, *, validation_fraction: float = 0.0, eod_token: str = "</s>"
) -> Path:
    """Write texts as `nemotron data prepare` does, with the embedded tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    options = PrepareOptions(eod_token=eod_token, validation_fraction=validation_fraction)
    tokenizer = load_tokenizer("embedded")
    receipt = write_texts(texts, folder, tokenizer, options)
    assemble([receipt], folder, tokenizer, options, [])
    return folder


def write_ids(documents: Iterable[list[int]], folder: Path, *, validation_fraction: float) -> Path:
    """Write documents that are ids already; each gets the end of document."""
    folder.mkdir(parents=True, exist_ok=True)
    options = PrepareOptions(validation_fraction=validation_fraction)
    tokenizer = load_tokenizer("embedded")
    parts = (Ids(document, 0, is_last=True) for document in documents)
    receipt = write_documents(parts, folder, 0, tokenizer, options, Tally(print))
    assemble([receipt], folder, tokenizer, options, [])
    return folder
