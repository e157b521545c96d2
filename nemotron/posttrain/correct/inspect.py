"""Looking at the rows of a correction recipe: what a step reads, and what it must answer."""

from collections.abc import Iterator

from jaxtyping import Bool
from torch import Tensor

from nemotron.data.batch import NO_LABEL, Batch
from nemotron.data.folder import open_source
from nemotron.data.inspect import check_all
from nemotron.data.inspect_pairs import print_pairs
from nemotron.data.tokenizer import Tokenizer
from nemotron.exit_codes import DONE
from nemotron.posttrain.correct.batches import PairBatches
from nemotron.posttrain.correct.config import CorrectConfig
from nemotron.posttrain.correct.layout import ANSWER, RUN
from nemotron.posttrain.correct.stage import CorrectionData
from nemotron.terminal import print_text, printable


def inspect_recipe(
    config: CorrectConfig, *, step: int, rows: int, documents: int, check: bool
) -> int:
    """Print the pairs of each source, and rows of a step with the answers at their slots.

    Raises:
        UserError: when the pairs are unfit, or `check` finds a damaged file.
    """
    data = CorrectionData(config)
    for source in config.data.sources:
        limit = min(config.model.vocab_size, data.tokenizer.vocab_size)
        tokens = open_source(source, config.data, data.tokenizer, limit)
        print_pairs(source.name, tokens, data.tokenizer, documents=documents)
        if check:
            check_all([tokens.train, tokens.validation], limit)
    if check:
        print_text("all files and all ids are correct")
    batches = PairBatches(config, data.sources, data.specials)
    for number in range(step):
        batches.take(number)
    batch = batches.take(step)
    for row in range(min(rows, len(batch.labels))):
        print_text(f"step {step} row {row}:")
        for line in _row(batch, row, data.tokenizer):
            print_text(line)
    return DONE


def _row(batch: Batch, row: int, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what is read of each pair of a row, and then its answers."""
    assert batch.seq_idx is not None
    ids, pairs = batch.input_ids[row], batch.seq_idx[row]
    inside = ids >= 0 if batch.padding is None else ~batch.padding[row]
    for pair in pairs[inside].unique().tolist():
        own = inside & (pairs == pair)
        answers = batch.labels[row][own]
        shown = tokenizer.decode(answers[answers != NO_LABEL].tolist())
        yield f"  reads    {printable(tokenizer.decode(ids[own].tolist()))}"
        if shown:
            yield f"  answers  {printable(shown)}"
        yield from _runs(batch, row, own, tokenizer)


def _runs(batch: Batch, row: int, own: Bool[Tensor, " T"], tokenizer: Tokenizer) -> Iterator[str]:
    if RUN not in batch.extras:
        return
    run, answer = batch.extras[RUN][row], batch.extras[ANSWER][row]
    for number in run[own & (run != NO_LABEL)].unique().tolist():
        slots = own & (run == number)
        text = tokenizer.decode(answer[slots & (answer != NO_LABEL)].tolist())
        yield f"  run      {printable(text)} in {int(slots.sum())} slots"
