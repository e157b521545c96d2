"""The folder of a run: who may use it, and the files that describe the run."""

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.representer import RoundTripRepresenter

from nemotron.checkpoint.manifest import steps
from nemotron.errors import RunFailed, UserError, show_value
from nemotron.files import FULL, open_regular, read_regular, why_unwritable, write_bytes
from nemotron.parallel.runtime import Ranks
from nemotron.run.files import RunFiles
from nemotron.run.lock import LOCK, FolderLock
from nemotron.section import Section
from nemotron.yaml_text import parse_yaml

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
    "data.verify_checksums",
    "precision.observe_every_steps",
    "parallel",
    "ops",
    "checkpoint",
    "stop",
    "evaluation",
    "logging",
    "reliability.check_replicas_every_steps",
    "reliability.deterministic",
    "reliability.straggler_factor",
    "reliability.straggler_after",
    "reliability.faults",
)
"""Keys that a resumed run may change: they alter place, speed or reports, not what is computed."""

FIXED = (
    "seed",
    "batch.global_tokens",
    "data.seq_len",
    "data.lengths",
    "data.packing",
    "data.objective",
    "data.mask_eod_loss",
    "data.tokenizer",
    "data.eod_token",
    "data.validation_fraction",
)
"""Keys that decide which rows the steps so far read, so that no resumed run may change them."""

SHAPING = (
    "optimizer.name",
    "model.vocab_size",
    "model.hidden_size",
    "model.hybrid_override_pattern",
    "model.tie_word_embeddings",
    "model.mamba_num_heads",
    "model.mamba_head_dim",
    "model.n_groups",
    "model.ssm_state_size",
    "model.conv_kernel",
    "model.use_conv_bias",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.intermediate_size",
    "model.n_routed_experts",
    "model.moe_intermediate_size",
    "model.moe_shared_expert_intermediate_size",
    "model.moe_latent_size",
    "model.num_nextn_predict_layers",
    "model.mtp_hybrid_override_pattern",
)
"""Keys that decide which tensors a checkpoint holds; no resumed run may change them either."""

WRITE_TEST_BYTES = 1 << 16
LONGEST_LIST = 400
"""Characters of a list that differs from that of the run."""


class RunFolder(RunFiles):
    """A folder with what a run of a recipe leaves, held by one process while it is entered."""

    def __init__(self, path: Path, config: Section) -> None:
        super().__init__(path)
        self._config = config
        self._lock = FolderLock(path)
        self._late: dict[Path, bytes] = {}

    def check(self, num_steps: int, *, resume: bool, allow_changed: Sequence[str] = ()) -> None:
        """Check, without writing anything, that this run may use the folder.

        Raises:
            UserError: when another process holds it, when it holds a run and `resume` is off, or
                when its run had another recipe in more than `FREE_TO_CHANGE` and `allow_changed`.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError("is a file; give the run another name.", where=str(self.path))
        self._lock.check()
        if not holds_run(self):
            return
        known = flatten(self._config.model_dump())
        for key in allow_changed:
            if not any(_covers([key], name) for name in known):
                raise UserError(
                    "is not a key of the recipe; name one.", key="--allow-changed", value=key
                )
        done = max(steps(self.checkpoints), default=0)
        allowed = (*FREE_TO_CHANGE, *allow_changed)
        changed = self._changes()
        self._refuse_fixed([(key, line) for key, line in changed if _covers(allow_changed, key)])
        changes = {key: line for key, line in changed if not _covers(allowed, key)}
        if changes:
            more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
            free = [
                f"--allow-changed {key}" for key in changes if not _covers((*FIXED, *SHAPING), key)
            ]
            allow = f"allow the change with {' '.join(free[:5])}, " if free else ""
            raise UserError(
                f"contains a run with a different recipe: "
                f"{'; '.join([*changes.values()][:5])}{more}; "
                f"restore these keys, {allow}or give the new run another name.",
                where=str(self.path),
            )
        if resume:
            return
        if done >= num_steps:
            raise UserError(
                f"contains a finished run of {done} steps; give the new run another name.",
                where=str(self.path),
            )
        raise UserError(
            f"contains a run at step {done} of {num_steps}; "
            f"add --resume to continue it, or give the new run another name.",
            where=str(self.path),
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
            self._lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def check_place(self) -> None:
        """Check, without writing, that the folder may be written to or made.

        Raises:
            UserError: when it may not.
        """
        if (error := why_unwritable(self.path)) is not None:
            raise self._unwritable(error)

    def _unwritable(self, error: OSError) -> UserError:
        full = error.errno in FULL
        advice = "make room there, or " if full else ""
        return UserError(
            f"cannot be written: {error.strerror or error}; "
            f"{advice}set `output` to a {'larger' if full else 'writable'} folder.",
            where=str(self.path),
            because=error,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.is_held() and [path.name for path in self.path.iterdir()] == [LOCK]:
            shutil.rmtree(self.path)  # it never became a run
        self._lock.release()

    def is_held(self) -> bool:
        """Say whether the folder that was entered, here or on another rank, has its name."""
        return self._lock.is_held()

    def check_held(self) -> None:
        """Raise RunFailed when the folder was removed or renamed since it was entered."""
        if not self.is_held():
            raise RunFailed(
                f"the folder of this run, {self.path}, was removed or renamed while the run wrote "
                "to it; put it back and use --resume"
            )

    def open_log(self, rank: int) -> Path:
        """Return the log of a rank; its folder is created unless the disk is full."""
        path = self.log_of(rank)
        with contextlib.suppress(OSError):
            if path.parent != self.path:
                path.parent.mkdir(exist_ok=True)
        return path

    def catch_up(self) -> OSError | None:
        """Write what was refused; returns why it still is, if it is."""
        problems = [self._write(path, content) for path, content in [*self._late.items()]]
        return next((problem for problem in problems if problem is not None), None)

    @contextmanager
    def held(self, ranks: Ranks) -> Iterator[None]:
        """Hold the folder for all ranks, of which the first creates and locks it."""
        ranks.first(lambda: self.__enter__() and None)
        try:
            yield
        finally:
            if ranks.is_first:
                self.__exit__(None, None, None)

    def write_status(
        self, state: str, step: int, exit_code: int | None = None, why: object = None
    ) -> None:
        """Say how the newest start of the run stands: running, done, stopped or failed, and why.

        Whoever started it may not learn it from an exit code: torchrun has one of its own. On a
        full disk, and in a folder that was renamed, the old content is overwritten in place.
        """
        content = {"state": state, "step": step, "exit_code": exit_code}
        content |= {} if why is None else {"reason": str(why)}
        if self.is_held():
            self.write(self.status, content)
        else:
            _overwrite(self._lock.place / self.status.name, _bytes(content))

    def write(self, path: Path, content: Any) -> None:  # Any: whatever JSON can hold
        """Replace a file of the folder by bytes, text or JSON, now or when there is room."""
        self._write(path, content if isinstance(content, bytes) else _bytes(content))

    def write_description(self, tokenizer: bytes) -> None:
        """Write the resolved recipe and the tokenizer."""
        self.write(self.recipe, dump_recipe(self._config))
        self.write(self.tokenizer, tokenizer)

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
        self.write(self.chat_template, template)
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
        ids = {"eos_token_id": eos_ids, **others}
        self.write(self.companions / "generation_config.json", ids | sampling)

    def write_precision(self, table: list[dict[str, str]]) -> None:
        """Write which format each linear layer computes in, and why."""
        self.write(self.precision, table)

    def write_experts(self, step: int, layers: Mapping[str, Any]) -> None:  # Any: nested JSON
        """Write load and bias of every expert, by layer, as they are after a step."""
        self.write(self.experts, json.dumps({"step": step, "layers": layers}) + "\n")

    def _write(self, path: Path, content: bytes) -> OSError | None:
        self._late.pop(path, None)
        try:
            if path.parent != self.path:  # which is never made anew
                path.parent.mkdir(exist_ok=True)
            write_bytes(path, content)
        except OSError as error:
            if path == self.status and error.errno in FULL and _overwrite(path, content):
                return None
            self._late[path] = content
            return error
        return None

    def _refuse_fixed(self, allowed: Sequence[tuple[str, str]]) -> None:
        """Refuse changes that the user allows but no run survives."""
        for key, line in allowed:
            if _covers(FIXED, key):
                raise UserError(
                    f"{line}, and decides which rows the steps so far read, so "
                    f"--allow-changed does not help; restore it, change it for a phase that has "
                    f"not begun (phases, with --allow-changed phases), or start a new run with "
                    f"init_from={self.path}.",
                    where=str(self.path),
                )
            if _covers(SHAPING, key):
                raise UserError(
                    f"{line}, and decides which tensors the checkpoints hold, so --allow-changed "
                    "does not help; restore it, or give the new run another name.",
                    where=str(self.path),
                )

    def _changes(self) -> list[tuple[str, str]]:
        """Return each key that differs from the folder's recipe, with a clause old/new."""
        if not self.recipe.exists():
            return []
        try:
            read = parse_yaml(read_regular(self.recipe).decode(), str(self.recipe), {})
        except (UserError, UnicodeDecodeError):
            read = None
        if not isinstance(read, dict):
            raise UserError(
                "is damaged, so the settings of this run are unknown; "
                "restore it, or give the new run another name.",
                where=str(self.recipe),
            )
        old = flatten(self._completed(read))
        new = flatten(_plain(self._config.model_dump()))
        return [
            (key, f"{key} was {_shown(old.get(key))}, is {_shown(new.get(key))}")
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key)
        ]

    def _completed(self, read: dict[str, Any]) -> Any:  # Any: nested YAML
        """Return an earlier recipe with the defaults of the keys that came after its version.

        One that breaks today's rules is returned as it is.
        """
        try:
            return _plain(type(self._config).model_validate(read).model_dump())
        except ValidationError:
            return read


def _bytes(content: Any) -> bytes:  # Any: text, or whatever JSON can hold
    text = content if isinstance(content, str) else f"{json.dumps(content, indent=2)}\n"
    return text.encode()


def _overwrite(path: Path, content: bytes) -> bool:
    """Write over a small file, in the place that it has on the disk; says whether that worked."""
    try:
        descriptor = open_regular(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        size = os.fstat(descriptor).st_size
        return os.pwrite(descriptor, content.ljust(size), 0) >= len(content)
    except OSError:
        return False
    finally:
        os.close(descriptor)


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
            f"is the recipe of the run in {home.path}, but its name and output lead to "
            f"{run.absolute()}; to resume the run, add output={home.path.parent} "
            f"name={home.path.name}.",
            where=str(recipe),
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


def _shown(value: Any) -> str:  # Any: what YAML holds
    """Return a value as a recipe writes it, a mapping without its keys that are absent."""
    if isinstance(value, Mapping):
        given = {key: part for key, part in value.items() if part not in (None, [], {})}
        return f"{{{', '.join(f'{key}: {_shown(part)}' for key, part in given.items())}}}"
    if isinstance(value, list):
        text = ", ".join(map(_shown, value))
        return f"[{text}]" if len(text) <= LONGEST_LIST else f"[{text[:LONGEST_LIST]}...]"
    return show_value(value)


def _plain(value: Any) -> Any:  # Any: nested JSON
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def flatten(value: dict[str, Any], start: str = "") -> dict[str, Any]:  # Any: nested JSON
    """Return nested values by dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{start}{key}.")
        else:
            flat[f"{start}{key}"] = item
    return flat


def _covers(allowed: Sequence[str], key: str) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in allowed)
