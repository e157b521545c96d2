"""The embedded corpus, tokenized once for all tests: 3 s of a core for each cache of its own."""

import functools
import shutil
from pathlib import Path

from nemotron.data.config import EMBEDDED_DOMAINS, DataConfig
from nemotron.data.embedded import prepare_embedded
from nemotron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def fill_cache(cache: Path) -> None:
    """Put the tokenized corpus into a folder `data.cache`, as a run before leaves it there."""
    for folder in _prepared():
        shutil.copytree(folder, cache / folder.name)


@functools.cache
def _prepared() -> list[Path]:
    """Return the folders in the cache of this checkout, which all processes share."""
    config = DataConfig(cache=str(ROOT / DataConfig().cache))
    Path(config.cache).mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer("embedded")
    return [prepare_embedded(domain, config, tokenizer) for domain in EMBEDDED_DOMAINS]
