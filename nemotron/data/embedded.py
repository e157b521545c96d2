"""The embedded corpus as prepared folders in the cache, made on first use."""

import json
import logging
from pathlib import Path

import xxhash

from nemotron.data.cache import held_cache, new_entry
from nemotron.data.config import DataConfig
from nemotron.data.corpus import corpus_hash, load_documents
from nemotron.data.folder import MANIFEST, FileFacts, Manifest, read_manifest
from nemotron.data.prepare.assemble import assemble
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.unit import write_texts
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of the name of an embedded folder; raise it when its content changes."""


def prepare_embedded(domain: str, config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Return the prepared folder of a domain in `config.cache`, made there on first use.

    A folder is used again only when every file has the hash in its manifest; processes wait for
    each other, and one that is killed leaves nothing that counts.
    """
    cache, fraction = Path(config.cache), config.validation_fraction
    what = (FORMAT, corpus_hash(domain), tokenizer.hash, config.eod_token, fraction)
    name = f"{domain}-{xxhash.xxh64_hexdigest(json.dumps(what).encode())}"
    folder = cache.absolute() / name
    with held_cache(cache):
        if not is_whole(folder):
            texts = load_documents(domain)
            # Neighbours in the corpus are scenes of one play: mix them, the same way everywhere.
            texts.sort(key=lambda text: xxhash.xxh64_digest(text.encode()))
            options = PrepareOptions(eod_token=config.eod_token, validation_fraction=fraction)
            with new_entry(folder) as part:
                receipt = write_texts(texts, part, tokenizer, options)
                assemble([receipt], part, tokenizer, options, [{"name": f"embedded {domain}"}])
            log.info("tokenized %s: %d documents into %s", domain, len(texts), folder)
    return folder


def is_whole(folder: Path) -> bool:
    """Return whether a prepared folder has all files of its manifest, unchanged."""
    if not (folder / MANIFEST).exists():
        return False
    try:
        manifest = read_manifest(folder)
    except UserError:
        manifest = None
    whole = manifest is not None and not damaged_files(folder, manifest)
    if not whole:
        log.warning("%s is damaged and is written again", folder)
    return whole


def damaged_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files that are missing or have another hash than the manifest says."""
    return [
        path
        for path, facts in _files(folder, manifest).items()
        if not path.exists() or hash_file(path) != facts.xxh128
    ]


def missing_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files that are missing or have another size than the manifest says."""
    return [
        path
        for path, facts in _files(folder, manifest).items()
        if not path.exists() or path.stat().st_size != facts.bytes
    ]


def _files(folder: Path, manifest: Manifest) -> dict[Path, FileFacts]:
    return {
        folder / name: facts
        for shard in (*manifest.train, *manifest.validation)
        for name, facts in shard.files.items()
    }
