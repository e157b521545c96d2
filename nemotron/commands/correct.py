"""Commands around the correction of text: a file of candidates in, a file of answers out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.shared import CommandGroup, Device, Model, ReplaceFile

if TYPE_CHECKING:
    from nemotron.posttrain.correct.answers import Corrects

app = CommandGroup()


@app.command(epilog="Example: nemotron correct runs/soft --in nbest.jsonl --out fixed.jsonl")
def correct(
    model: Model,
    source: Annotated[
        Path, typer.Option("--in", help="JSON lines with the field candidates, the best first.")
    ],
    out: Annotated[Path, typer.Option(help="JSON lines to write, each with its answer.")],
    ar: Annotated[
        bool,
        typer.Option("--ar", help="Let a model that answers chats write the text token by token."),
    ] = False,
    candidates: Annotated[
        int, typer.Option(min=1, max=16, help="Candidates that a prompt shows, with --ar.")
    ] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(
            max=0,
            help="Log-probability up to which a token is answered anew; default: the run's own.",
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="How tokens sound, and whose experts read them in a model that has some by "
            "language; default: as the language of each line, and the gate."
        ),
    ] = None,
    timed: Annotated[
        bool, typer.Option("--timed", help="Correct one line at a time, and write its ms.")
    ] = False,
    judged: Annotated[
        bool,
        typer.Option("--judged", help="Write the log-probability of each token that was chosen."),
    ] = False,
    max_bad_rows: Annotated[
        int, typer.Option(min=0, help="Lines that may be unreadable; they are left out.")
    ] = 0,
    overwrite: ReplaceFile = False,
    device: Device = "auto",
) -> int:
    """Correct texts for which a recognizer or a writer offers candidates."""
    from nemotron.exit_codes import DONE
    from nemotron.posttrain.correct.answers import Files, correct_file
    from nemotron.terminal import say

    if ar:
        corrects = _token_by_token(model, candidates, language, device)
    else:
        corrects = _parallel(model, threshold, language, device)
    counts = correct_file(Files(source, out, max_bad_rows, overwrite, timed, judged), corrects)
    for sentence in counts.sentences():
        say(sentence)
    return DONE


def _token_by_token(model: Path, candidates: int, language: str | None, device: str) -> "Corrects":
    from nemotron.device import find_device
    from nemotron.generate.decode_layers import decode_view
    from nemotron.loading import fix_language, load_with_tokenizer, stop_ids
    from nemotron.posttrain.correct.autoregressive import WrittenOut

    loaded, tokenizer = load_with_tokenizer(model, find_device(device))
    fix_language(loaded, language)
    return WrittenOut(
        decode_view(loaded, pack=True), tokenizer, stop_ids(model, loaded.config), candidates
    )


def _parallel(
    model: Path, threshold: float | None, language: str | None, device: str
) -> "Corrects":
    """Return what corrects by a run of the stage correct.

    Raises:
        UserError: when it is another kind of run, or has no threshold.
    """
    from nemotron.data.correct.sound import LANGUAGES, sound_of
    from nemotron.device import find_device
    from nemotron.errors import UserError
    from nemotron.generate.decode_layers import decode_view
    from nemotron.loading import fix_language, load_with_tokenizer
    from nemotron.posttrain.correct.config import CorrectConfig
    from nemotron.posttrain.correct.parallel import InParallel
    from nemotron.posttrain.correct.run import Corrector, text_ids
    from nemotron.posttrain.correct.stage import read_threshold, specials_of
    from nemotron.recipe.load import load_recipe
    from nemotron.run.files import RunFiles

    run = RunFiles.around(model)
    config = load_recipe(run.path).config if run and run.recipe.is_file() else None
    if run is None or not isinstance(config, CorrectConfig):
        raise UserError(
            "is not a run of stage: correct; give one, or use --ar for a model that answers chats.",
            where=str(model),
        )
    experts = config.model.language_experts
    is_fixed = language is not None and experts is not None and language in experts.languages
    if language is not None and not (is_fixed and language not in LANGUAGES):
        sound_of(language)
    loaded, tokenizer = load_with_tokenizer(model, find_device(device))
    if is_fixed:
        fix_language(loaded, language)
    vocab_size = loaded.config.vocab_size
    specials = specials_of(tokenizer, config.data.eod_token, vocab_size)
    allowed = text_ids(vocab_size, tokenizer.vocab_size, tokenizer.special_ids)
    if threshold is None and config.correct.kind == "soft":
        threshold = read_threshold(run.path, config.correct)
    on_device = allowed.to(next(loaded.parameters()).device)
    view = decode_view(loaded, pack=True)
    corrector = Corrector(view, config.correct, specials, on_device, threshold or 0.0)
    return InParallel(corrector, tokenizer, language if language in LANGUAGES else None)
