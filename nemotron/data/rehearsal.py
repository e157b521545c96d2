"""Opening the data of a run as the run will, without writing into its cache."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nemotron.data.cache import check_place
from nemotron.data.config import ConversationDataConfig, DataConfig
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import Timeline
from nemotron.data.prepare.inputs import is_text
from nemotron.data.raw import TextSource
from nemotron.data.tokenizer import Tokenizer, load_tokenizer

LARGEST_TEXT = 64 << 20
"""Bytes of text that are tokenized for it; more is left to the run."""


def rehearse(
    config: DataConfig,
    timeline: Timeline,
    *,
    seed: int,
    vocab_size: int,
    check: Callable[[Tokenizer, bool], None] = lambda tokenizer, is_chat: None,
) -> list[str]:
    """Return the lines with which a run describes its data, after all checks that it makes.

    Text that is not in the cache yet is tokenized into a folder that is removed again. If there is
    much of it, the rows and passes are not checked, and a line says so. `check` is called with the
    tokenizer, and whether there are, or may be, conversations.

    Raises:
        UserError: when the run would be refused for its data.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    tokenizer.id(config.eod_token)
    check_place(Path(config.cache))
    # conversations are rendered by the run itself, which is quick
    named = () if isinstance(config, ConversationDataConfig) else [*_paths(config, timeline)]
    paths = dict.fromkeys(path for path in named if is_text(path))
    texts = [TextSource(path, config, tokenizer, config.validation_fraction) for path in paths]
    waiting = [text for text in texts if not text.is_prepared]
    if sum(text.num_bytes for text in waiting) > LARGEST_TEXT:
        check(tokenizer, len(paths) < len(dict.fromkeys(named)))
        return [
            f"{text.path}: {len(text.plan.inputs):,} inputs, {text.num_bytes / 1e6:,.0f} MB, which "
            "the run tokenizes first; rows and passes are known only then"
            for text in waiting
        ]
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(config.cache)
        for path in cache.iterdir() if cache.is_dir() else ():
            if not path.name.startswith(".") and path.suffix != ".tmp":
                Path(folder, path.name).symlink_to(path.absolute())
        with_own_cache = config.model_copy(update={"cache": folder})
        data = TrainingData(with_own_cache, timeline, seed=seed, vocab_size=vocab_size)
        check(data.tokenizer, data.has_conversations)
        data.check_length()
        return data.describe()


def _paths(config: DataConfig, timeline: Timeline) -> Iterator[str]:
    """Yield every path that is read."""
    for source in (leaf.source for leaf in timeline.leaves):
        yield from (path for path in (source.path, source.validation) if path is not None)
    yield from (extra.path for extra in (*config.validation, *timeline.validation))
