"""Checks an export against its checkpoint: `python -m nemotron.hf.selfcheck FOLDER CHECKPOINT`.

It runs in a process of its own, so that nothing in the exporting process's memory can hide a
mistake in the files.
"""

import importlib.metadata
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from nemotron.data.batch import Batch
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.exit_codes import DONE, FAILED
from nemotron.files import hash_file, write_json
from nemotron.hf.folder import REPORT, read_folder
from nemotron.hf.formats import CHOICES, FORMATS, DiskFormat, Formats, Plain
from nemotron.hf.names import DiskParameter, disk_parameters, disk_tensors
from nemotron.hf.quantized.digest import digest_of_constants, with_constants
from nemotron.hf.quantized.linear import QuantizedLinear, WithConstants
from nemotron.hf.quantized.read import read_declaration
from nemotron.hf.shards import INDEX, ShardedFolder
from nemotron.hf.source import CheckpointSource, open_checkpoint
from nemotron.hf.tokenizer_files import read_tokenizer
from nemotron.model.build import build_around, shapes
from nemotron.model.config import MTP_DEPTHS, ModelConfig
from nemotron.model.hybrid import HybridLM
from nemotron.terminal import print_text

TOLERANCE = 2e-5
"""Largest difference of logits, over the largest logit, between two float32 implementations."""


TEXTS = (
    "def read(path):\n    return open(path).read()  # not yet\n",
    " It's 1,024 tokens; don't count them.",
    "\tTo be,  or not to be:\r\n\n   that is the question",
    "naïve Köln, Привет, 日本語, 👩‍🌾 \u200b\u00a0!",
    '"quoted" <tags> & {braces} [0]',
    "",
)
"""Texts that tokenizers split in different ways; none has the name of a special token."""


class Failed(Exception):
    """A check that failed; its text is what was found."""


class NotComparable(Exception):
    """Says why a comparison cannot be made on this machine."""


@dataclass(frozen=True)
class Result:
    """One line of the table; `outcome` is ok, skipped or FAILED."""

    check: str
    outcome: str
    detail: str


class SelfCheck:
    """The checks of one exported folder."""

    def __init__(
        self,
        folder: Path,
        source: CheckpointSource,
        choices: Sequence[Formats] = CHOICES,
        digest: str | None = None,
    ) -> None:
        self._folder, self._source, self._digest = folder, source, digest
        self._stored = ShardedFolder(folder)
        declared = read_declaration(folder)
        candidates = [disk_parameters(source.config, source.formats(choice)) for choice in choices]
        if declared is not None:
            candidates = [declared.formatted(own, self._stored.tensors) for own in candidates]
        # the choice with the fewest wrong tensors is the one that was made
        self._parameters = min(candidates, key=lambda parameters: len(self._wrong(parameters)))

    def run(self) -> list[Result]:
        """Make every check; one that fails does not stop the next."""
        return [
            _result("names, shapes, dtypes", self.check_schema),
            *([_result("scales", self.check_scales)] if self._digest else []),
            _result("values on disk", self.check_values),
            _result("nemotron.load", self.check_own_loader),
            _result("tokenizer", self.check_tokenizer),
            _result("transformers", self.check_transformers),
        ]

    @property
    def files(self) -> list[str]:
        """The folder's safetensors files."""
        return sorted({stored.file for stored in self._stored.tensors.values()})

    def check_schema(self) -> str:
        """Compare names, shapes, dtypes and total size with what the configuration asks for."""
        if wrong := self._wrong(self._parameters):
            raise Failed(f"{len(wrong)} tensors are not as expected: {', '.join(wrong[:10])}")
        total = sum(parameter.num_bytes for parameter in self._parameters)
        if self._stored.total_size != total:
            raise Failed(f"total_size in {INDEX} is {self._stored.total_size} instead of {total}")
        return f"{len(self._stored.tensors):,} tensors, {total:,} bytes in {len(self.files)} files"

    def check_values(self) -> str:
        """Compare every bit on disk with the checkpoint's tensor in its format on disk."""
        read, rounded, total = self._source.reader(), Counter[str](), 0
        for bare in self._parameters:
            parameter = with_constants(bare, self._stored.read)
            for name, tensor in read(parameter).items():
                if not _same_bits(self._stored.read(name), tensor):
                    raise Failed(f"{name} differs from the checkpoint")
            total += prod(parameter.shape)
            rounded[parameter.format.name] += read.num_rounded(parameter)
        changed = [f"{count:,} to {name}" for name, count in rounded.items() if count]
        if not changed:
            return "every bit is the checkpoint's"
        return f"the checkpoint's; of {total:,} float32 values, {', '.join(changed)} were rounded"

    def check_scales(self) -> str:
        """Compare the scales of quantized layers with those that the export was given."""
        read = (with_constants(parameter, self._stored.read) for parameter in self._parameters)
        if digest_of_constants(read) != self._digest:
            raise Failed("the scales on disk are not those of the quantization")
        count = len(disk_tensors(self._parameters)) - len(self._parameters)
        return f"{count:,} tensors are those of the quantization"

    def check_own_loader(self) -> str:
        """Compare logits and multi-token prediction of the loaded folder with the checkpoint's."""
        lack_of_memory(self._source.config, copies=2)
        loaded, expected = self._load(), self._round_checkpoint()
        for output, wanted in zip(_outputs(loaded), _outputs(expected), strict=True):
            if not torch.equal(output, wanted):
                raise Failed("the loaded folder gives other results than the checkpoint")
        mtp = " and multi-token prediction" if loaded.mtp is not None else ""
        return f"logits{mtp} equal the checkpoint's"

    def check_transformers(self) -> str:
        """Load with transformers, without its time-step floor, and compare tensors and logits."""
        packed = {p.format.name for p in self._parameters if not is_plain(p.format)}
        if packed:
            raise NotComparable(f"transformers does not read {', '.join(sorted(packed))}")
        lack_of_memory(self._source.config, copies=2)
        theirs, version = load_with_transformers(self._folder, self._source.config)
        weights = theirs.state_dict()
        for own in self._parameters:
            if not own.name.startswith("mtp."):
                value = own.part_of(weights[own.source.replace("backbone.", "model.", 1)])
                if not _same_bits(value, self._stored.read(own.name).to(value.dtype)):
                    raise Failed(f"{own.name} has a different value after transformers loaded it")
        ours = self._load()
        logits = _outputs(ours)[0]
        with torch.no_grad():
            expected = theirs(input_ids=_tokens(ours)).logits
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise Failed(f"logits differ by {difference:.1e} of the largest, limit {TOLERANCE:.0e}")
        return f"{version}: tensors equal, logits within {difference:.1e} (limit {TOLERANCE:.0e})"

    def check_tokenizer(self) -> str:
        """Compare the ids that transformers gives texts with those that training gives them."""
        if self._source.run is None:
            raise NotComparable("the checkpoint lies in no run, so its tokenizer is unknown")
        transformers = _transformers()
        theirs = transformers.AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        ours = Tokenizer(read_tokenizer(self._source.run.tokenizer))
        # an imported model may have been trained elsewhere with tokens around its texts
        added = {} if self._source.is_trained else {"add_special_tokens": False}
        for text, expected in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
            found = theirs(text, **added)["input_ids"]
            if found != expected:
                raise Failed(f"{text!r} is {found} for transformers, {expected} in training")
        return f"{len(TEXTS)} texts have the ids of training"

    def _wrong(self, parameters: Sequence[DiskParameter]) -> list[str]:
        """Return the names of tensors that are not in the folder as these parameters ask for."""
        expected = {t.name: (t.shape, t.stored_dtype) for t in disk_tensors(parameters)}
        found = {name: (t.shape, t.dtype) for name, t in self._stored.tensors.items()}
        return [name for name in expected | found if expected.get(name) != found.get(name)]

    def _load(self) -> HybridLM:
        # the folder itself declares the formats of quantized layers
        forms = (parameter.format for parameter in self._parameters)
        own = [form for form in forms if not isinstance(form, QuantizedLinear | WithConstants)]
        loaded = read_folder(self._folder, tuple(dict.fromkeys([*FORMATS, *own])))
        return build_around(loaded.config, loaded.weights)

    def _round_checkpoint(self) -> HybridLM:
        """Return the checkpoint's model with the precision of the export."""
        read, config = self._source.reader(), self._source.config
        weights = {name: torch.empty(shape) for name, shape in shapes(config).items()}
        for bare in self._parameters:
            parameter = with_constants(bare, self._stored.read)
            parameter.part_of(weights[parameter.source]).copy_(parameter.decode(read(parameter)))
        return build_around(config, weights)


def is_plain(form: DiskFormat) -> bool:
    """Say whether a format is one tensor of a dtype; other constants may lie beside it."""
    return isinstance(form.inner if isinstance(form, WithConstants) else form, Plain)


def load_with_transformers(folder: Path, config: ModelConfig) -> tuple[nn.Module, str]:
    """Return transformers' model of the folder in float32, and the library's name and version.

    Its time step is clamped as ours is; as it comes, transformers clamps it to 0.001 or more.

    Raises:
        NotComparable: when transformers is not installed.
        UserError: when transformers finds a tensor missing, unexpected or of another shape.
    """
    transformers = _transformers()
    model, found = transformers.NemotronHForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
        local_files_only=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in found.items() if names}
    if wrong:
        raise UserError(f"transformers reports {wrong}")
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = config.time_step_limit
    return model.eval(), f"transformers {importlib.metadata.version('transformers')}"


def _transformers() -> ModuleType:
    """Return the library; raises NotComparable where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise NotComparable("transformers is not installed: pip install 'nemotron-train[hf]'")
    import transformers  # 1 s, and only here

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def lack_of_memory(config: ModelConfig, *, copies: int) -> None:
    """Check that so many float32 copies of the model fit into free memory.

    Raises:
        NotComparable: when they don't.
    """
    needed = copies * 4 * sum(shape.numel() for shape in shapes(config).values())
    free = _free_bytes()
    if free is not None and needed > free:
        raise NotComparable(f"needs {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} are free")


def _free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _outputs(model: HybridLM) -> list[Tensor]:
    """Return the logits and the hidden states of each multi-token-prediction depth."""
    ids = _tokens(model)
    with torch.no_grad():
        hidden = model(ids)
        outputs = [model.logits(hidden)]
        if model.mtp is not None:
            ahead = Batch(ids, ids, None).look_ahead(MTP_DEPTHS).ahead
            outputs += model.mtp_hidden(hidden, [depth.input_ids for depth in ahead], None)
    return outputs


def _tokens(model: HybridLM) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (2, 65), generator=generator)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit patterns, so that NaN equals itself and 0 differs from -0."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integer), b.view(integer))


def _result(name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(name, "ok", check())
    except NotComparable as reason:
        return Result(name, "skipped", str(reason))
    except (Failed, UserError) as problem:
        return Result(name, "FAILED", str(problem))


def main(
    folder: Path,
    checkpoint: Path,
    choices: Sequence[Formats] = CHOICES,
    digest: str | None = None,
) -> int:
    """Make the checks, print one table, write the report; returns 1 when one failed.

    `digest` is that of the scales of a quantized model.
    """
    source = open_checkpoint(checkpoint)
    # of text correction, only the trunk is exported
    source = (
        source.trunk if source.config.num_candidates > 1 or source.config.edit_heads else source
    )
    check = SelfCheck(folder, source, choices, digest)
    results = check.run()
    for result in results:
        print_text(f"  {result.check:22} {result.outcome:8} {result.detail}")
    report = {
        "checkpoint": checkpoint.name,
        "checks": [asdict(result) for result in results],
        "xxh128": {name: hash_file(folder / name) for name in check.files},
    }
    write_json(folder / REPORT, report)
    return FAILED if any(result.outcome == "FAILED" for result in results) else DONE


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), digest=(*sys.argv[3:], None)[0]))
