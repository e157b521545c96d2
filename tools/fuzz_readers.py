"""Functions with which commands read a file, called without the commands around them.

Each reads a file of the current folder, as the fuzzer has damaged it, and returns when nothing is
wrong with it.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from nemotron.checkpoint.find import locate
from nemotron.checkpoint.manifest import CheckpointInfo
from nemotron.checkpoint.read import read_model, read_model_config, read_state
from nemotron.data.config import ChatOptions, PreferenceOptions
from nemotron.data.folder import open_tokens
from nemotron.data.inspect import check_all
from nemotron.data.prepare.inputs import plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.unit import write_unit
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import RunFailed, UserError
from nemotron.evaluate.sample_file import SampleFile
from nemotron.exit_codes import DONE, FAILED, WRONG_INPUT
from nemotron.generate.prompts import AnswerFile, read_prompts
from nemotron.guard import describe
from nemotron.hf.adapter import read_adapters
from nemotron.hf.read_scales import read_scales
from nemotron.hf.source import open_checkpoint
from nemotron.hf.tokenizer_files import check_tokenizer, read_tokenizer
from nemotron.hf.weights import read_weights
from nemotron.loading import read_chat_files, recipe_ops
from nemotron.merge.window import read_checkpoints
from nemotron.posttrain.correct.config import CorrectOptions
from nemotron.posttrain.correct.stage import read_threshold
from nemotron.posttrain.environments.base import messages_of
from nemotron.posttrain.pivots import read_turns
from nemotron.posttrain.reverify import read_rollouts
from nemotron.recipe.load import load_recipe
from nemotron.report.provenance import describe_starts
from nemotron.report.run import read_briefly, read_run
from nemotron.report.summary import rows
from nemotron.run.files import RunFiles
from nemotron.run.metrics import MetricsFile
from nemotron.run.provenance import with_start
from nemotron.run.status import read_status
from nemotron.terminal import print_text
from nemotron.train.pretraining import open_data
from nemotron.train.schedule import plan_training

Direct = Callable[[], object]

HALF = Path("runs/half")


def call(direct: Direct) -> int:
    """Call a function, and return the exit code that a command would have."""
    try:
        direct()
    except UserError as error:
        print_text(str(error))
        return WRONG_INPUT
    except RunFailed as error:
        print_text(str(error))
        return FAILED
    except BaseException as error:  # those of libraries in Rust are no Exception
        sentence, code = describe(error, ["fuzz"])
        print_text(sentence)
        return code
    return DONE


def recipe(name: str, *overrides: str) -> Direct:
    return lambda: load_recipe(name, overrides)


def exported(folder: str) -> Direct:
    """Read the weights and the fixed scales of a Hugging Face folder."""

    def read() -> None:
        read_weights(Path(folder))
        read_scales(Path(folder))

    return read


def kept(folder: str) -> Direct:
    """Read the small files beside the weights."""

    def read() -> None:
        read_chat_files(Path(folder))
        read_tokenizer(Path(folder) / "tokenizer.json")

    return read


def tokenizer(path: str) -> Direct:
    return lambda: Tokenizer(check_tokenizer(Path(path), 4096)).encode("The river runs.")


def prepared(source: str, *, is_chat: bool = False) -> Direct:
    """Encode rows of a file, and write them as a shard."""
    options = PrepareOptions(chat=ChatOptions() if is_chat else None)
    return lambda: _prepare(source, options)


def preferences() -> None:
    _prepare("preferences.jsonl", PrepareOptions(preferences=PreferenceOptions()))


def _prepare(source: str, options: PrepareOptions) -> None:
    own = load_tokenizer("embedded")
    for unit in plan([source], options).units:
        write_unit(unit, Path(), own, options, lambda size: None, lambda text: None)


def shards(folder: str, name: str = "embedded") -> Direct:
    """Open prepared data and check every id."""

    def read() -> None:
        own = load_tokenizer(name)
        tokens = open_tokens(folder, own, "</s>", own.vocab_size)
        check_all([tokens.train, tokens.validation], own.vocab_size)

    return read


def packed() -> None:
    """Open the rows of conversations, as their cache has them."""
    config = load_recipe("sft.yaml", []).text
    open_data(config, plan_training(config)).batch(0)


def reported() -> None:
    """Read metrics as `report`, `compare` and `runs` do."""
    files = RunFiles(Path("runs/mine"))
    files.recipe.unlink()
    read = read_run(files.path)
    describe_starts(read)
    rows([read, read_briefly(files)])


def run() -> None:
    """Read a run as these commands do, and as a resumed training does."""
    files = RunFiles(HALF)
    files.recipe.unlink()
    describe_starts(read_run(HALF))
    read_status(files)
    with_start(files.provenance, 1, {})
    with MetricsFile(files.metrics, last_step=2):
        pass


def run_recipe() -> None:
    load_recipe(HALF)
    recipe_ops(HALF)


def checkpoint(folder: str) -> Direct:
    """Read the newest checkpoint of a run: records, index and tensors."""
    return lambda: read_model(_newest(folder).folder)


def records(folder: str) -> Direct:
    """Read the JSON of the newest checkpoint of a run."""

    def read() -> None:
        found = _newest(folder)
        read_state(found)
        read_model_config(found)

    return read


def _newest(folder: str) -> CheckpointInfo:
    found = locate(Path(folder)).info
    assert found is not None, "else locate raises"
    return found


def adapters() -> None:
    source = open_checkpoint(Path("runs/adapted"))
    read_adapters(source)
    source.reader()
    read_model(source.info.folder)


def merged() -> None:
    read_checkpoints(RunFiles(Path("runs/mine")), print)


def rollouts() -> None:
    for path in sorted(Path("runs/played/rollouts").glob("*.jsonl")):
        for rollout in read_rollouts(path):
            rollout.as_line()


def turns() -> None:
    for _, row in read_turns(Path("trajectories.jsonl")):
        messages_of(row)


def threshold() -> None:
    read_threshold(Path("runs/corrector"), CorrectOptions())


def answers() -> None:
    settings = json.loads(Path("scores/samples.settings.json").read_text())
    with contextlib.closing(SampleFile(Path("scores/samples.jsonl"), settings)):
        pass


def settings() -> None:
    with contextlib.closing(SampleFile(Path("scores/samples.jsonl"), {})):
        pass


def prompts() -> None:
    for prompt in read_prompts(Path("prompts.jsonl")):
        dataclasses.astuple(prompt)


def written() -> None:
    lines = read_prompts(Path("prompts.jsonl"))
    with contextlib.closing(AnswerFile(Path("written.jsonl"), lines, resume=True)):
        pass
