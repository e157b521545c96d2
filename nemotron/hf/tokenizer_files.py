"""The small files beside the weights: how to tokenize and how to generate."""

import json
from pathlib import Path
from typing import Any

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import parse_json, write_bytes
from nemotron.hf.inside import read_inside
from nemotron.model.config import ModelConfig
from nemotron.run.files import RunFiles

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"

SETTINGS = "tokenizer_config.json"

Values = dict[str, Any]  # Any: nested JSON

ADDING = ("add_bos_token", "add_eos_token")
"""Settings with which transformers adds tokens around a text."""

KEPT = (SETTINGS, "special_tokens_map.json", GENERATION, CHAT_TEMPLATE)
"""Files of an imported folder that its run keeps, and an export of that run writes again."""


def write_tokenizer_files(
    run: RunFiles, target: Path, config: ModelConfig, *, is_trained: bool
) -> list[str]:
    """Write the tokenizer and its companions: those the run was imported with, else our own.

    A model that `is_trained` here has learned from texts alone, so what adds tokens to a text (a
    beginning of text, for example) is left out. Returns notes on that.

    Raises:
        UserError: when the run has no tokenizer that fits the model.
    """
    content = check_tokenizer(run.tokenizer, config.vocab_size)
    files = {name: _json(values) for name, values in _own_files(Tokenizer(content), config).items()}
    files |= read_kept_files(run.companions)[0] | {TOKENIZER: content}
    notes = []
    if is_trained:
        for name, change in ((TOKENIZER, _without_added_tokens), (SETTINGS, _adding_nothing)):
            values = parse_json(files[name])
            if isinstance(values, dict) and (changed := change(values)) != values:
                files[name] = _json(changed)
                notes.append(f"{name} adds no tokens to a text, as in training")
    for name, written in files.items():
        write_bytes(target / name, written)
    return notes


def _without_added_tokens(layout: Values) -> Values:
    """Return the content of a `tokenizer.json` without what adds tokens around a text."""
    step = layout.get("post_processor")
    if step is None:
        return layout
    inner = [part for part in step.get("processors", [step]) if part.get("type") == "ByteLevel"]
    kept = step | {"processors": inner} if "processors" in step else step
    return layout | {"post_processor": kept if inner else None}


def _adding_nothing(settings: Values) -> Values:
    """Return the content of a `tokenizer_config.json` that asks for no added tokens."""
    return settings | {key: False for key in ADDING if settings.get(key)}


def check_tokenizer(path: Path, vocab_size: int) -> bytes:
    """Return the content of a `tokenizer.json` after a look into it.

    Raises:
        UserError: when it is absent, no tokenizer, or has more tokens than the model.
    """
    content = read_tokenizer(path)
    try:
        tokenizer = Tokenizer(content)
    except ValueError as error:
        raise UserError(f"is not a tokenizer.json: {error}.", where=str(path)) from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"has {tokenizer.vocab_size} tokens, vocab_size is {vocab_size}; "
            "this is not the tokenizer of the model.",
            where=str(path),
        )
    return content


def read_tokenizer(path: Path) -> bytes:
    """Return the content of a `tokenizer.json`.

    Raises:
        UserError: when there is none, or it is not a regular file of its folder.
    """
    try:
        return read_inside(path)
    except FileNotFoundError:
        raise UserError("does not exist; the model needs its tokenizer.", where=str(path)) from None


def read_kept_files(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Return the companions that a folder brings, and notes on what was left out of them.

    Raises:
        UserError: when one of them is not JSON, or not a regular file of the folder.
    """
    kept, notes = {}, []
    for name in KEPT:
        path = folder / name
        try:
            content = read_inside(path)
        except FileNotFoundError:
            continue
        if path.suffix == ".json":
            try:
                values = parse_json(content)
            except ValueError as error:
                raise UserError(f"is not valid JSON: {error}.", where=str(path)) from None
            if isinstance(values, dict) and values.pop("auto_map", None) is not None:
                notes.append(
                    f"auto_map in {name} names remote code, which was left out and not executed"
                )
                content = json.dumps(values, indent=2).encode()
        kept[name] = content
    return kept, notes


def read_stop_ids(folder: Path) -> frozenset[int]:
    """Return the tokens that end a text by a folder's `generation_config.json`.

    Raises:
        UserError: when that file is there, but not as it should be.
    """
    content = read_kept_files(folder)[0].get(GENERATION)
    values = parse_json(content) if content is not None else {}
    found = values.get("eos_token_id") if isinstance(values, dict) else None
    ids = found if isinstance(found, list) else [found] * (found is not None)
    if not all(type(i) is int for i in ids):
        raise UserError(
            "must be the id of a token, or a list of them; correct the file.",
            key="eos_token_id",
            value=found,
            where=str(folder / GENERATION),
        )
    return frozenset(ids)


def special_ids(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, int | None]:
    """Return the tokens that have a role, under the names of `config.json`.

    The configuration's defaults are those of Nemotron's tokenizers; in a foreign one, such a number
    may be that of an ordinary token, which then has no role.
    """
    named = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    found = {key: i if i in tokenizer.special_ids else None for key, i in named.items()}
    return {**found, "eos_token_id": config.eos_token_id}


def _own_files(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Values]:
    ids = {key: i for key, i in special_ids(tokenizer, config).items() if i is not None}
    names = {key.removesuffix("_id"): tokenizer.token(i) for key, i in ids.items()}
    special = {role: name for role, name in names.items() if name is not None}
    return {
        SETTINGS: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_position_embeddings,
            **special,
        },
        "special_tokens_map.json": special,
        GENERATION: {**ids, "do_sample": True, "temperature": 1.0, "top_p": 1.0},
    }


def _json(values: Values) -> bytes:
    return json.dumps(values, indent=2, ensure_ascii=False).encode()
