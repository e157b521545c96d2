"""Turning text into shards: the user's own, and the embedded corpus on first use."""

import json
import logging
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from nemotron.data.corpus import corpus_hash, load_documents
from nemotron.data.indexed import Shard, ShardWriter, id_type
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file, locked, write_json

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the name of an embedded shard; raise it when its content changes."""
ENCODED_AT_ONCE = 256
"""Documents given to the tokenizer together."""


def manifest_path(prefix: Path) -> Path:
    """Return where the description of a shard of ours lies: beside it, `PREFIX.json`."""
    return Path(f"{prefix}.json")


def write_shard(
    documents: Iterable[str], prefix: str | Path, tokenizer: Tokenizer, *, eod_token: str = "</s>"
) -> Path:
    """Write documents as `PREFIX.bin`, `PREFIX.idx` and, last, the manifest `PREFIX.json`.

    Each document becomes its tokens and one `eod_token`; names of special tokens inside the text
    are plain text. Documents without text are skipped and counted.

    Returns:
        The prefix, as an absolute path for `data.sources`.
    """
    prefix = Path(prefix).absolute()
    eod_id = tokenizer.id(eod_token)
    manifest_path(prefix).unlink(missing_ok=True)
    documents, empty, text_bytes = iter(documents), 0, 0
    with ShardWriter(prefix, id_type(tokenizer.vocab_size)) as writer:
        while texts := list(islice(documents, ENCODED_AT_ONCE)):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                if not ids:
                    empty += 1
                    continue
                text_bytes += len(text.encode())
                writer.add([*ids, eod_id])
    if empty:
        log.warning("%s: skipped %d documents without text", prefix, empty)
    files = [Path(f"{prefix}.{end}") for end in ("bin", "idx")]
    manifest = {
        "tokenizer": tokenizer.hash,
        "eod_id": eod_id,
        "documents": len(writer.lengths),
        "tokens": sum(writer.lengths),
        "text_bytes": text_bytes,
        "files": {f.name: {"bytes": f.stat().st_size, "xxh128": hash_file(f)} for f in files},
    }
    write_json(manifest_path(prefix), manifest)
    return prefix


def open_shard(prefix: str | Path, tokenizer: Tokenizer, *, eod_token: str = "</s>") -> Shard:
    """Open a shard and check its manifest, if it has one, against the tokenizer.

    Raises:
        UserError: when the shard is unfit, empty or was made with another tokenizer or
            another end of document.
    """
    shard = Shard(prefix)
    if not shard.num_tokens:
        raise UserError(f"{shard.bin} holds no tokens; give a shard with documents in it.")
    if manifest_path(shard.prefix).exists():
        manifest = _read_manifest(shard.prefix)
        if (made_with := manifest.get("tokenizer")) != tokenizer.hash:
            raise UserError(
                f"{shard.prefix} was made with the tokenizer {made_with}, but data.tokenizer is "
                f"{tokenizer.hash}; name the tokenizer.json of the shard."
            )
        if (eod_id := manifest.get("eod_id")) != tokenizer.id(eod_token):
            raise UserError(
                f"{shard.prefix} ends its documents with id {eod_id}, but data.eod_token = "
                f"{eod_token} is id {tokenizer.id(eod_token)}; name the shard's token."
            )
    return shard


def prepare_embedded(domain: str, cache: Path, tokenizer: Tokenizer, eod_token: str) -> Path:
    """Return the prefix of a domain's shard in `cache`, made there on first use.

    A shard is used again only when its manifest is there and both files have the hashes in it;
    processes wait for each other, and one that is killed leaves nothing that counts.
    """
    what = (FORMAT, corpus_hash(domain), tokenizer.hash, eod_token)
    prefix = cache.absolute() / f"{domain}-{xxhash.xxh64_hexdigest(json.dumps(what).encode())}"
    with locked(cache / ".lock"):
        if not _is_whole(prefix):
            for leftover in cache.glob(f"*{prefix.name}.*.tmp"):
                leftover.unlink()
            texts = load_documents(domain)
            # Neighbours in the corpus are scenes of one play: mix them, the same way everywhere.
            texts.sort(key=lambda text: xxhash.xxh64_digest(text.encode()))
            write_shard(texts, prefix, tokenizer, eod_token=eod_token)
            log.info("tokenized %s: %d documents into %s", domain, len(texts), prefix)
    return prefix


def _read_manifest(prefix: Path) -> dict[str, Any]:  # Any: what JSON holds
    path = manifest_path(prefix)
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        manifest = None
    if not isinstance(manifest, dict):
        raise UserError(f"{path} is no shard manifest; remove it or write the shard again.")
    return manifest


def _is_whole(prefix: Path) -> bool:
    if not manifest_path(prefix).exists():
        return False
    for name, known in _read_manifest(prefix)["files"].items():
        path = prefix.with_name(name)
        if not path.exists() or hash_file(path) != known["xxh128"]:
            log.warning("%s is missing or damaged and is made again", path)
            return False
    return True
