"""Text to token ids and back."""

import bisect
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash
from numpy.typing import NDArray

from nemotron.data.corpus import EMBEDDED
from nemotron.errors import UserError
from nemotron.files import read_regular, write_bytes

MOST_TOKENS = 1 << 24
"""Limit of a vocabulary, of which each id takes memory; a hundred times what is published."""
LONGEST_TOKEN = 1 << 16
MOST_GROWTH = 64
"""Limit of how many times as long a text becomes by the replacements of a tokenizer."""
WORDS_LEFT = 3
"""Words at the end of a text that more text may change: the last one, and spaces before it."""


class Tokenizer:
    """A `tokenizer.json` and what the trainer must know of it; threads may share one."""

    def __init__(self, content: bytes) -> None:
        """Read the content of a `tokenizer.json`; raises `ValueError` when it is none."""
        self.content = content
        self.hash = xxhash.xxh128_hexdigest(content)
        self._plain = _read(content, specials=False)
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        layout = json.loads(self._plain.to_str())
        self.is_piecewise = _is_piecewise(layout)
        self.vocab_size = max(vocabulary.values()) + 1
        self.token_bytes = _count_bytes(vocabulary, layout)
        self.special_ids = frozenset(t["id"] for t in layout["added_tokens"] if t["special"])
        """Tokens that stand for no text."""

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The tokenizer that reads names of special tokens; made when it is first used."""
        return _read(self.content, specials=True)

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Return the ids of `text`; names like `</s>` in it are plain text unless `specials`."""
        return self.encode_batch([text], specials=specials)[0]

    def encode_batch(self, texts: Sequence[str], *, specials: bool = False) -> list[list[int]]:
        """Encode many texts at once, on all cores."""
        tokenizer = self._with_specials if specials else self._plain
        with _answering():
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text with names of special tokens, and the characters of each."""
        with _answering():
            encoding = self._with_specials.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_start(self, text: str) -> tuple[list[int], int]:
        """Return ids that whatever follows `text` cannot change, and how many characters they are.

        The last words are left out, because more text may change them; 0 characters where the
        ids of a beginning cannot be known, as with tokenizers that look at the text as a whole.
        """
        if not self.is_piecewise:
            return [], 0
        with _answering():
            encoding = self._plain.encode(text, add_special_tokens=False)
        words = [-1 if word is None else word for word in encoding.word_ids]
        end = bisect.bisect_left(words, words[-1] - WORDS_LEFT + 1) if words else 0
        ids = encoding.ids[:end]
        start = self.decode(ids)
        return (ids, len(start)) if text.startswith(start) else ([], 0)

    def decode(self, ids: Iterable[int], *, skip_specials: bool = False) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become replacement characters."""
        with _answering():
            return self._plain.decode(list(ids), skip_special_tokens=skip_specials)

    def id(self, token: str) -> int:
        """Return the id of a token.

        Raises:
            UserError: when the vocabulary has no such token.
        """
        found = self._plain.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}; name one that it has.")
        return found

    def token(self, index: int) -> str | None:
        """Return the name of a token; None where the vocabulary has none of this id."""
        return self._plain.id_to_token(index)

    def gives_ids_of(self, other: "Tokenizer") -> bool:
        """Say whether both give every text the same ids; what is added around it does not count."""
        contents = [json.loads(tokenizer._plain.to_str()) for tokenizer in (self, other)]
        for content in contents:
            content["post_processor"] = None
        return bool(contents[0] == contents[1])

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json`, byte for byte as it was read."""
        write_bytes(path, self.content)


def _read(content: bytes, *, specials: bool) -> tokenizers.Tokenizer:
    """Return a tokenizer that keeps its settings: to change them per call is unsafe in threads."""
    layout = _parse(content)
    _check_merges(layout)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of the library, which is in Rust, is no Exception
        raise ValueError(str(error)) from error
    largest = max(vocabulary.values(), default=-1)
    if not 0 <= largest < MOST_TOKENS:
        raise ValueError(f"its largest id is {largest}, it must be from 0 to {MOST_TOKENS - 1}")
    if (longest := max(map(len, vocabulary))) > LONGEST_TOKEN:
        raise ValueError(f"a token has {longest} characters; it may have {LONGEST_TOKEN}")
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (growth := _growth(layout.get(name))) > MOST_GROWTH:
            raise ValueError(
                f"its {name} makes a text {growth:.1e} times as long; it may be {MOST_GROWTH} times"
            )
    # Lengths and padding of a published file must not cut or fill documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not specials
    return tokenizer


def _parse(content: bytes) -> dict[str, Any]:  # Any: nested JSON
    """Return the one meaning of a `tokenizer.json`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    try:
        layout = json.loads(content, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(layout, dict):
        raise ValueError("it is not a mapping")
    return layout


def _check_merges(layout: dict[str, Any]) -> None:  # Any: nested JSON
    """Refuse a merge without the prefix of its model.

    The library cuts the prefix off without looking, which ends the process.
    """
    model = layout.get("model")
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(prefix, str) or not prefix:
        return
    merges = model.get("merges")
    for merge in merges if isinstance(merges, list) else []:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        last = parts[-1] if isinstance(parts, list) and parts else None
        if not isinstance(last, str) or not last.startswith(prefix):
            raise ValueError(
                f"the merge {merge!r} does not go on with continuing_subword_prefix {prefix!r}"
            )


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what the library says of a tokenizer that fails on a text into a mistake.

    Its errors are of the class `Exception` itself, and its panics are none: a panic is, for
    example, a regular expression that never ends.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, Exception) and type(error) is not Exception:
            raise
        raise UserError(f"the tokenizer fails on a text: {error}; use another one.") from None


def _growth(step: Any) -> float:  # Any: nested JSON
    """Return how many times as long the replacements of a step can make a text."""
    if isinstance(step, list):
        return math.prod(map(_growth, step))
    if not isinstance(step, dict):
        return 1.0
    own = 1.0
    if step.get("type") == "Replace":
        new, pattern = str(step.get("content", "")), step.get("pattern")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        # what an expression matches may be empty, which is found beside every character
        own = max(1.0, len(new) / max(1, len(old)) if isinstance(old, str) else len(new) + 1)
    return own * math.prod(_growth(inner) for inner in step.values())


def _is_piecewise(layout: dict[str, Any]) -> bool:  # Any: nested JSON
    """Say whether words do not depend on where a text begins, and ids decode to the same text."""
    steps = json.dumps(layout["pre_tokenizer"])
    return (
        layout["pre_tokenizer"] is not None
        and layout["normalizer"] is None
        and (layout["decoder"] or {}).get("type") == "ByteLevel"
        and '"add_prefix_space": true' not in steps
        and all(token["special"] for token in layout["added_tokens"])
    )


def _count_bytes(vocabulary: dict[str, int], layout: dict[str, Any]) -> NDArray[np.int64]:
    """Count the bytes of text that each id stands for; special tokens stand for none."""
    byte_level = "ByteLevel" in json.dumps(layout["decoder"])
    added = {token["id"]: token for token in layout["added_tokens"]}
    counts = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        if index in added:
            counts[index] = 0 if added[index]["special"] else len(token.encode())
        elif byte_level:  # each character of the vocabulary stands for one byte
            counts[index] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):  # SentencePiece's bytes
            counts[index] = 1
        else:
            counts[index] = len(token.replace("\u2581", " ").encode())
    return counts


def load_tokenizer(name_or_path: str, key: str = "data.tokenizer") -> Tokenizer:
    """Return the embedded tokenizer for `embedded`, else that of a `tokenizer.json`.

    `key` is what the user calls the setting.

    Raises:
        UserError: when there is no such file, or it is no tokenizer.
    """
    path = Path(name_or_path)
    if name_or_path == "embedded":
        path = EMBEDDED / "tokenizer.json"
    elif path.is_dir():
        path /= "tokenizer.json"
    try:
        return Tokenizer(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        rule = "does not exist; give the path of a tokenizer.json, or embedded."
        raise UserError(rule, key=key, value=path.resolve()) from None
    except (ValueError, KeyError) as error:
        rule = f"is not a tokenizer.json: {error}."
        raise UserError(rule, key=key, value=path.resolve()) from None
