"""Sources that are text: prepared into the cache on first use, as `nemotron data prepare` does."""

import json
import logging
import re
import shutil
from pathlib import Path

import xxhash

from nemotron.data.config import DataConfig
from nemotron.data.embedded import missing_files
from nemotron.data.folder import read_manifest
from nemotron.data.prepare.inputs import Plan, is_text, plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.run import TooManyBadRows, identity_of, prepare
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.files import locked

log = logging.getLogger(__name__)

MOST_BAD_ROWS = 100
"""Of one source; `nemotron data prepare` allows others."""


class TextSource:
    """A path that names text, and the folder of the cache in which its tokens are kept.

    The folder is named after everything that decides its content: the files with their sizes and
    times of change, the tokenizer and the options.
    """

    def __init__(
        self, path: str, config: DataConfig, tokenizer: Tokenizer, hold_out: float
    ) -> None:
        """Look at the files; `hold_out` is the share of the documents not to train on.

        Raises:
            UserError: when there is nothing to read.
        """
        self.path = path
        self._options = PrepareOptions(eod_token=config.eod_token, validation_fraction=hold_out)
        self._tokenizer = config.tokenizer
        cache = Path(config.cache).absolute()
        self.plan: Plan = plan([path], self._options, (cache,))
        what = identity_of(self.plan, tokenizer, self._options) | {"stamps": self.plan.stamps}
        label = re.sub(r"[^\w-]+", "-", Path(path).name.split(".")[0])[:40].strip("-") or "text"
        self.folder = cache / f"{label}-{xxhash.xxh64_hexdigest(json.dumps(what).encode())}"

    @property
    def is_prepared(self) -> bool:
        """Whether the folder exists, with every file in its size."""
        try:
            manifest = read_manifest(self.folder)
        except UserError:
            return False
        return manifest is not None and not missing_files(self.folder, manifest)

    @property
    def num_bytes(self) -> int:
        """Size of the text on disk."""
        return sum(unit.size for unit in self.plan.units)

    def prepare(self) -> Path:
        """Return the folder of tokens, made now if it is not there; other processes wait for it.

        One process does it, with as many threads as there are cores. A preparation that is killed
        goes on where it stopped.

        Raises:
            UserError: when the text cannot be read, or the disk takes no more.
        """
        with locked(self.folder.with_name(f".{self.folder.name}.lock")):
            if not self.is_prepared:
                self._prepare()
        return self.folder

    def _prepare(self) -> None:
        number, size = len(self.plan.inputs), self.num_bytes / 1e6
        log.info("preparing %s: %d inputs, %.1f MB, into %s", self.path, number, size, self.folder)
        if self.folder.is_symlink():
            self.folder.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)  # it was damaged
        try:
            manifest = prepare(
                [self.path],
                self.folder,
                tokenizer=self._tokenizer,
                options=self._options,
                workers=1,
                max_bad_rows=MOST_BAD_ROWS,
            )
        except TooManyBadRows as error:
            raise UserError(
                f"{error} {self.path} is prepared with the usual options here; `nemotron data "
                "prepare` takes others."
            ) from None
        for text in manifest.bad_rows:
            log.warning("left out: %s", text)


def tokens_of(path: str, config: DataConfig, tokenizer: Tokenizer, hold_out: float) -> str:
    """Return a path that names tokens: itself, or the folder that its text is prepared into.

    Raises:
        UserError: when the text cannot be prepared.
    """
    if not is_text(path):
        return path
    return str(TextSource(path, config, tokenizer, hold_out).prepare())
