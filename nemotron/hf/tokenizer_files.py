"""The small files beside the weights: how to tokenize and how to generate."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import parse_json, write_bytes, write_json
from nemotron.hf.inside import read_inside
from nemotron.model.config import ModelConfig
from nemotron.run.files import RunFiles

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"

KEPT = ("tokenizer_config.json", "special_tokens_map.json", GENERATION, CHAT_TEMPLATE)
"""Files of an imported folder that its run keeps, and an export of that run writes again."""


def write_tokenizer_files(run: RunFiles, target: Path, config: ModelConfig) -> None:
    """Write the tokenizer and its companions: those the run was imported with, else our own.

    Raises:
        UserError: when the run has no tokenizer that fits the model.
    """
    content = check_tokenizer(run.tokenizer, config.vocab_size)
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    write_bytes(target / TOKENIZER, content)
    for name, values in _own_files(tokenizer, config).items():
        write_json(target / name, values)
    for name in KEPT:
        kept = run.companions / name
        if kept.exists() or kept.is_symlink():
            write_bytes(target / name, read_inside(kept))


def check_tokenizer(path: Path, vocab_size: int) -> bytes:
    """Return the content of a `tokenizer.json` after a look into it.

    Raises:
        UserError: when it is absent, no tokenizer, or has more tokens than the model.
    """
    content = read_tokenizer(path)
    try:
        tokenizer = Tokenizer(content)
    except ValueError as error:
        raise UserError(f"{path} is not a tokenizer.json: {error}.") from None
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path} has {tokenizer.vocab_size} tokens, vocab_size is {vocab_size}; "
            "this is not the tokenizer of the model."
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
        raise UserError(f"{path} does not exist; the model needs its tokenizer.") from None


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
                raise UserError(f"{path} is not valid JSON: {error}.") from None
            if isinstance(values, dict) and values.pop("auto_map", None) is not None:
                notes.append(
                    f"auto_map in {name} names remote code, which was left out and not executed"
                )
                content = json.dumps(values, indent=2).encode()
        kept[name] = content
    return kept, notes


def _own_files(
    tokenizer: tokenizers.Tokenizer, config: ModelConfig
) -> dict[str, dict[str, Any]]:  # Any: JSON
    ids = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id,
        "pad_token": config.pad_token_id,
    }
    named = {role: tokenizer.id_to_token(token_id) for role, token_id in ids.items()}
    special = {role: token for role, token in named.items() if token is not None}
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            **special,
        },
        "special_tokens_map.json": special,
        GENERATION: {
            **{f"{role}_id": token_id for role, token_id in ids.items()},
            "do_sample": True,
            "temperature": 1.0,
            "top_p": 1.0,
        },
    }
