"""The manifest of a prepared folder, from the receipts of its units."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron.data.folder import FORMAT, MANIFEST, Counts, Manifest
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.unit import BAD_ROWS_NAMED, Receipt
from nemotron.data.tokenizer import Tokenizer
from nemotron.files import write_json


def assemble(
    receipts: Sequence[Receipt],
    folder: Path,
    tokenizer: Tokenizer,
    options: PrepareOptions,
    inputs: Sequence[dict[str, Any]],  # Any: strings and numbers
) -> Manifest:
    """Write the manifest, which does not depend on the time or the number of processes."""
    counts = Counts()
    for receipt in receipts:
        counts = counts.plus(receipt.counts)
    bad_rows = [text for receipt in receipts for text in receipt.bad_rows]
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer.hash,
        eod_token=options.eod_token,
        eod_id=tokenizer.id(options.eod_token),
        validation_fraction=options.validation_fraction,
        inputs=tuple(inputs),
        options=options.described(),
        counts=counts,
        bad_rows=tuple(bad_rows[:BAD_ROWS_NAMED]),
        train=tuple(receipt.train for receipt in receipts if receipt.train),
        validation=tuple(receipt.validation for receipt in receipts if receipt.validation),
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest
