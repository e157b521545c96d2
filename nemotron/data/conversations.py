"""Conversations of a recipe as prepared folders in the cache, made on first use."""

import json
import logging
import os
from pathlib import Path

import xxhash

from nemotron.data.cache import held_cache
from nemotron.data.config import (
    ChatDataConfig,
    ChatOptions,
    PreferenceDataConfig,
    PreferenceOptions,
    SourceConfig,
)
from nemotron.data.embedded import is_whole
from nemotron.data.folder import MANIFEST, TokenSet
from nemotron.data.prepare.inputs import plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.run import prepare
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import hash_file

log = logging.getLogger(__name__)

FORMAT = 1
"""Part of the name of a folder; raise it when its content changes."""


def prepare_conversations(
    source: SourceConfig,
    config: ChatDataConfig | PreferenceDataConfig,
    tokenizer: Tokenizer,
    held_out: float,
) -> SourceConfig:
    """Return the source with the path of a prepared folder, made in `config.cache` if it must be.

    Folders that are prepared already, and shards, stay as they are. The name of a new folder comes
    from the content of the files and from the options; `held_out` is the share that is held out.

    Raises:
        UserError: when the source does not exist, or has more unfit rows than `chat.max_bad_rows`.
    """
    assert source.path is not None, source.name
    if is_prepared(source.path):
        return source
    options = _options(config, held_out)
    try:
        inputs = plan([source.path], options).inputs
        hashes = [hash_file(Path(facts["name"])) for facts in inputs if "bytes" in facts]
        what = [FORMAT, list(inputs), hashes, tokenizer.hash, options.described()]
        digest = xxhash.xxh64_hexdigest(json.dumps(what).encode())
        folder = Path(config.cache).absolute() / f"chat-{_word(source.name)}-{digest}"
        with held_cache(folder.parent):
            if not is_whole(folder):
                prepare(
                    [source.path],
                    folder,
                    tokenizer=config.tokenizer,
                    options=options,
                    workers=len(os.sched_getaffinity(0)),
                    max_bad_rows=config.chat.max_bad_rows,
                    limit="data.chat.max_bad_rows",
                    overwrite=folder.exists(),
                )
                log.info("prepared %s into %s", source.path, folder)
    except UserError as error:
        raise error.at(f"data.sources: {source.name}") from None
    return source.model_copy(update={"path": str(folder)})


def _options(config: ChatDataConfig | PreferenceDataConfig, held_out: float) -> PrepareOptions:
    """Return how the sources of a recipe are prepared."""
    if isinstance(config, PreferenceDataConfig):
        pairs = {name: getattr(config.chat, name) for name in PreferenceOptions.model_fields}
        return PrepareOptions(
            eod_token=config.eod_token,
            validation_fraction=held_out,
            preferences=PreferenceOptions(**pairs),
        )
    chat = {name: getattr(config.chat, name) for name in ChatOptions.model_fields}
    return PrepareOptions(
        eod_token=config.eod_token, validation_fraction=held_out, chat=ChatOptions(**chat)
    )


def is_prepared(path: str) -> bool:
    """Say whether a path names a prepared folder, a folder of shards or one shard."""
    folder = Path(path)
    if folder.is_dir():
        return (folder / MANIFEST).exists() or any(folder.glob("*.idx"))
    return Path(f"{path}.idx").exists()


def check_texts(name: str, tokens: TokenSet) -> None:
    """Check that a source holds texts or conversations.

    Raises:
        UserError: when it holds aligned pairs, whose sequences are no text, or pairs of answers.
    """
    if tokens.manifest is not None and tokens.manifest.form == "preferences":
        raise UserError(
            f"data.sources: {name} = {tokens.path} holds pairs of answers; train on them with "
            "stage: dpo."
        )
    if tokens.manifest is not None and tokens.manifest.form == "pairs":
        raise UserError(
            "holds pairs; train on them with stage: correct, or make conversations of them with "
            "`nemotron data pairs --as chat`.",
            key=f"data.sources: {name}",
            value=tokens.path,
        )


def check_preferences(name: str, tokens: TokenSet) -> None:
    """Check that a source holds pairs of answers.

    Raises:
        UserError: when it holds anything else.
    """
    if tokens.manifest is None or tokens.manifest.form != "preferences":
        raise UserError(
            f"data.sources: {name} = {tokens.path} holds no pairs of answers; give rows with "
            "prompt, chosen and rejected."
        )


def check_supervised(name: str, tokens: TokenSet) -> None:
    """Check that a source says which of its tokens are learned.

    Raises:
        UserError: when it is plain text.
    """
    if not tokens.train.is_supervised:
        raise UserError(
            "is text without turns of an assistant; give conversations, or train on text with "
            "stage: pretrain.",
            key=f"data.sources: {name}",
            value=tokens.path,
        )


def _word(name: str) -> str:
    """Return a name as part of that of a folder."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:40]
