"""What commands read undamaged each time is parsed once: recipes and tokenizers of the world."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import nemotron.data.tokenizer as tokenizer
import nemotron.yaml_text as yaml_text

EVENTS: dict[str, tuple[Any, ...]] = {}
TOKENIZERS: dict[bytes, dict[str, Any]] = {}


class _Parser:
    """In place of ruamel.yaml's: knows the undamaged texts, and parses all others."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def parse(self, text: str) -> Any:  # Any: an iterator of the events of ruamel.yaml
        known = EVENTS.get(text)
        return YAML(**self._options).parse(text) if known is None else iter(known)


def reuse(valid: Path) -> None:
    """Let this process and its children know the undamaged recipes and tokenizers of a folder."""
    for path in valid.rglob("*.yaml"):
        text = path.read_text()
        EVENTS[text] = tuple(YAML(typ="safe", pure=True).parse(text))
    yaml_text.YAML = _Parser  # type: ignore[assignment, misc]
    create = tokenizer.Tokenizer.__init__
    for content in {path.read_bytes() for path in valid.rglob("tokenizer.json")}:
        known = tokenizer.Tokenizer(content)
        known.encode("", specials=True)
        TOKENIZERS[content] = vars(known)

    def init(self: tokenizer.Tokenizer, content: bytes) -> None:
        known = TOKENIZERS.get(content)
        create(self, content) if known is None else vars(self).update(known)

    tokenizer.Tokenizer.__init__ = init  # type: ignore[method-assign]
