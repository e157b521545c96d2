"""The folder of a run: who may use it, and the files that describe the run."""

import datetime
import io
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.representer import RoundTripRepresenter

from nemotron.checkpoint.find import steps
from nemotron.errors import UserError
from nemotron.files import try_lock, write_bytes, write_json, write_text
from nemotron.parallel.runtime import Ranks
from nemotron.run.files import RunFiles
from nemotron.section import Section

FREE_TO_CHANGE = (
    "name",
    "output",
    "device",
    "recompute",
    "nonfinite_limit",
    "init_from",
    "batch.micro_batch",
    "data.cache",
    "data.max_epochs",
    "data.prefetch_steps",
    "precision.observe_every_steps",
    "parallel",
    "ops",
    "checkpoint",
    "evaluation",
    "logging",
    "reliability.check_replicas_every_steps",
    "reliability.deterministic",
    "reliability.straggler_factor",
    "reliability.straggler_after",
    "reliability.faults",
)
"""Keys that a resumed run may change: they alter place, speed or reports, not what is computed."""

WRITE_TEST_BYTES = 1 << 16


class RunFolder(RunFiles):
    """A folder with what a run of a recipe leaves, held by one process while it is entered."""

    def __init__(self, path: Path, config: Section) -> None:
        super().__init__(path)
        self._config = config
        self._lock = -1

    def check(self, num_steps: int, *, resume: bool, allow_changed: Sequence[str] = ()) -> None:
        """Check, without writing anything, that this run may use the folder.

        Raises:
            UserError: when another process holds it, when it holds a run and `resume` is off, or
                when its run had another recipe in more than `FREE_TO_CHANGE` and `allow_changed`.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file; give the run another name.")
        self._check_holder()
        if not holds_run(self):
            return
        known = _flatten(self._config.model_dump())
        for key in allow_changed:
            if not any(_covers([key], name) for name in known):
                raise UserError(f"--allow-changed {key}: the recipe has no such key; name one.")
        done = max(steps(self.checkpoints), default=0)
        allowed = (*FREE_TO_CHANGE, *allow_changed)
        changes = [line for key, line in self._changes() if not _covers(allowed, key)]
        if changes:
            more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise UserError(
                f"{self.path} contains a run with a different recipe: "
                f"{'; '.join(changes[:5])}{more}; "
                f"restore these keys, or give the new run another name."
            )
        if resume:
            return
        if done >= num_steps:
            raise UserError(
                f"{self.path} contains a finished run of {done} steps; give the new run another "
                "name."
            )
        raise UserError(
            f"{self.path} contains a run at step {done} of {num_steps}; "
            f"add --resume to continue it, or give the new run another name."
        )

    def __enter__(self) -> "RunFolder":
        """Create the folder, prove that it can be written, and hold its lock.

        Raises:
            UserError: when the folder cannot be written or another process was faster.
        """
        test = self.path / ".write-test"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_bytes(test, b"\0" * WRITE_TEST_BYTES)
            test.unlink()
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror or error}; "
                f"set `output` to a writable folder."
            ) from error
        if not try_lock(self._lock):
            os.close(self._lock)
            self._refuse_holder()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"host": platform.node(), "pid": os.getpid(), "since": now}
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, json.dumps(holder).encode(), 0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if [path.name for path in self.path.iterdir()] == [self._lock_path.name]:
            shutil.rmtree(self.path)  # it never became a run
        os.close(self._lock)  # the lock goes with it, as it does when the process dies

    @contextmanager
    def held(self, ranks: Ranks) -> Iterator[None]:
        """Hold the folder for all ranks, of which the first creates and locks it."""
        ranks.first(lambda: self.__enter__() and None)
        try:
            yield
        finally:
            if ranks.is_first:
                self.__exit__(None, None, None)

    def write_status(self, state: str, step: int, exit_code: int | None = None) -> None:
        """Say how the newest start of the run stands: running, done, stopped or failed.

        Whoever started it may not learn it from an exit code: torchrun has one of its own.
        """
        write_json(self.status, {"state": state, "step": step, "exit_code": exit_code})

    def write_description(self, tokenizer: bytes) -> None:
        """Write the resolved recipe and the tokenizer."""
        write_text(self.recipe, dump_recipe(self._config))
        write_bytes(self.tokenizer, tokenizer)

    def write_companions(self, files: Mapping[str, bytes]) -> None:
        """Write small files that take the place of an export's own, if there are any."""
        if files:
            self.companions.mkdir(exist_ok=True)
        for name, content in files.items():
            write_bytes(self.companions / name, content)

    def write_chat_files(self, template: str, eos_ids: list[int], others: dict[str, int]) -> None:
        """Write what an export of a model that learned conversations brings along.

        `hf/` holds companions that take the place of an export's own: the chat template, and the
        tokens at which generation stops.
        """
        self.companions.mkdir(exist_ok=True)
        write_text(self.companions / "chat_template.jinja", template)
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
        ids = {"eos_token_id": eos_ids, **others}
        write_json(self.companions / "generation_config.json", ids | sampling)

    def write_precision(self, table: list[dict[str, str]]) -> None:
        """Write which format each linear layer computes in, and why."""
        write_json(self.precision, table)

    @property
    def _lock_path(self) -> Path:
        return self.path / "lock"

    def _check_holder(self) -> None:
        try:
            descriptor = os.open(self._lock_path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            if not try_lock(descriptor):
                self._refuse_holder()
        finally:
            os.close(descriptor)

    def _refuse_holder(self) -> NoReturn:
        try:
            holder = json.loads(self._lock_path.read_text())
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError):
            who = "another process"
        raise UserError(
            f"{self.path} is in use by {who}; wait for it, stop it, or give this run another name."
        )

    def _changes(self) -> list[tuple[str, str]]:
        """Return each key that differs from the folder's recipe, with a clause old/new."""
        if not self.recipe.exists():
            return []
        try:
            read = YAML(typ="safe", pure=True).load(self.recipe.read_bytes().decode())
        except (YAMLError, UnicodeDecodeError):
            read = None
        if not isinstance(read, dict):
            raise UserError(
                f"{self.recipe} is damaged, so the settings of this run are unknown; "
                f"restore it, or give the new run another name."
            )
        old = _flatten(read)
        new = _flatten(_plain(self._config.model_dump()))
        return [
            (key, f"{key} was {old.get(key)}, is {new.get(key)}")
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]


def holds_run(files: RunFiles) -> bool:
    """Say whether a folder holds a run that began to train."""
    has_metrics = files.metrics.exists() and files.metrics.stat().st_size > 0
    return has_metrics or bool(steps(files.checkpoints))


def check_recipe_home(recipe: Path, run: Path) -> None:
    """Check, before a resume, that the recipe in the folder of a run names that folder.

    It does not when the folder was renamed or moved, and when its `output` is relative to another
    folder than the current one: `run` is then another run, or a new one.

    Raises:
        UserError: with the settings that resume the run in the folder.
    """
    home = RunFiles(recipe.absolute().parent)
    if recipe.name != home.recipe.name or not holds_run(home):
        return
    if run.resolve() != home.path.resolve():
        raise UserError(
            f"{recipe} is the recipe of the run in {home.path}, but its name and output lead to "
            f"{run.absolute()}; to resume the run, add output={home.path.parent} "
            f"name={home.path.name}."
        )


def dump_recipe(config: Section) -> str:
    """Return the resolved recipe as YAML that reads back to the same configuration."""
    yaml = YAML()
    yaml.Representer = _Representer
    text = io.StringIO()
    yaml.dump(_plain(config.model_dump()), text)
    return f"# Every setting of this run; continue it with --resume.\n{text.getvalue()}"


class _Representer(RoundTripRepresenter):
    """Writes absent values as `null` instead of nothing."""


_Representer.add_representer(
    type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _plain(value: Any) -> Any:  # Any: nested JSON
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _flatten(value: dict[str, Any], start: str = "") -> dict[str, Any]:  # Any: nested JSON
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flatten(item, f"{start}{key}.")
        else:
            flat[f"{start}{key}"] = item
    return flat


def _covers(allowed: Sequence[str], key: str) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed)
