"""What `nemotron generate` does once the model is loaded."""

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemotron.data.tokenizer import Tokenizer
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.generate.batch import BatchProgress, answers_in_order
from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import SLOTS, Engine
from nemotron.generate.prompts import AnswerFile, answer_line, read_prompts
from nemotron.generate.request import Request, requests_of
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.cache_formats import UNCHANGED, CacheFormats
from nemotron.model.hybrid import HybridLM
from nemotron.terminal import printable

OPTIONS = {"min_tokens": "--min-new-tokens", "stop_ids": "--stop-token-id"}
"""Options by the field of a request that they set."""


@dataclass(frozen=True)
class Continuation:
    """How each prompt is continued."""

    sampling: Sampling
    max_new_tokens: int
    stop: Sequence[str] = ()
    """Texts before which an answer ends."""
    stop_ids: Collection[int] = ()
    """Tokens at which it ends, beside the model's end of text."""
    min_new_tokens: int = 0
    own_stop_ids: Collection[int] = ()
    """Tokens at which it ends, also with `ignore_eos`."""
    include_stop: bool = False
    ignore_eos: bool = False
    """Whether neither `stop_ids` nor the model's end of text end it."""
    special_tokens: bool = False
    """Whether names of special tokens in the answer are shown."""
    reasoning_budget: int | None = None
    """Tokens after which `</think>` is put unless the model wrote it."""
    device: str = "auto"
    speculation: Speculation | None = None
    formats: CacheFormats = UNCHANGED


def generate(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    wanted: Continuation,
    *,
    stream: bool = True,
) -> int:
    """Print each prompt with its continuation, and tokens per second to the error stream.

    One prompt is printed while it grows if `stream` is on; several are printed when all are
    done. Names of special tokens in a prompt, such as `<|im_start|>`, are these tokens. A terminal
    gets control characters as escapes, a file or pipe as they are. Returns the exit code. The model
    is moved to the device and its weights are converted for decoding, so it cannot be trained
    afterwards.

    Raises:
        UserError: when a prompt is empty or a setting is impossible.
    """
    for prompt in prompts:
        if not _is_text(prompt):
            rule = "is not UTF-8 text; give it in that encoding."
            raise UserError(rule, key="prompt", value=repr(prompt))
    names = [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    requests = _requests(model, tokenizer, dict(zip(names, prompts, strict=True)), wanted)
    engine = _engine(model, tokenizer, wanted, len(requests))
    live, answers = stream and len(requests) == 1, dict.fromkeys(range(len(requests)), "")
    if live:
        print(_shown(prompts[0]), end="", flush=True)
    for event in engine.run(requests):
        answers[event.request] = event.answer.text
        if live:
            print(_shown(event.text), end="", flush=True)
    whole = [prompt + answer for prompt, answer in zip(prompts, answers.values(), strict=True)]
    print("" if live else _shown("\n\n".join(whole)))
    print(engine.timing, file=sys.stderr)
    if engine.speculator is not None:
        print(engine.speculator.acceptance, file=sys.stderr)
    return DONE


def generate_file(
    model: HybridLM,
    tokenizer: Tokenizer,
    path: Path,
    out: Path | None,
    wanted: Continuation,
    *,
    resume: bool = False,
) -> int:
    """Continue each prompt of a file, as `generate` does; one JSON object a line to `out`.

    Without `out` the lines are printed. With `resume` the prompts that `out` already answers are
    left out; the others get the answers of a run without interruption if there is a seed.

    Raises:
        UserError: when a prompt, a setting or a file is impossible.
    """
    lines = read_prompts(path)
    try:
        prompts = {f"line {line.number}": line.prompt for line in lines}
        requests = _requests(model, tokenizer, prompts, wanted)
    except UserError as error:
        raise error.at(str(path)) from None
    file = None if out is None else AnswerFile(out, lines, resume=resume)
    try:
        done = 0 if file is None else file.num_done
        engine = _engine(model, tokenizer, wanted, len(requests) - done)
        progress = BatchProgress(len(lines), done)
        answers = answers_in_order(engine, requests[done:])
        for line, answer in zip(lines[done:], answers, strict=True):
            if file is not None:
                file.write(line, answer)
            else:
                print(_shown(answer_line(line, answer)), flush=True)
            progress.add(answer)
        progress.show()
    finally:
        if file is not None:
            file.close()
    return DONE


def _requests(
    model: HybridLM, tokenizer: Tokenizer, prompts: Mapping[str, str], wanted: Continuation
) -> list[Request]:
    """Return the request of each prompt, which has a name for what is wrong with it."""
    budget = None
    if wanted.reasoning_budget is not None:
        budget = ReasoningBudget.of(tokenizer, wanted.reasoning_budget)
    tokens = tokenizer.encode_batch(list(prompts.values()), specials=True)
    requests = [
        replace(
            request,
            stop=tuple(wanted.stop),
            stop_ids=frozenset(wanted.own_stop_ids),
            include_stop_str_in_output=wanted.include_stop,
            min_tokens=wanted.min_new_tokens,
            ignore_eos=wanted.ignore_eos,
            skip_special_tokens=not wanted.special_tokens,
            budget=budget,
        )
        for request in requests_of(tokens, wanted.max_new_tokens, wanted.sampling)
    ]
    try:
        for request, name in zip(requests, prompts, strict=True):
            request.check(model.config.vocab_size, name)
    except UserError as error:
        raise error.renamed(OPTIONS) from None
    return requests


def _engine(model: HybridLM, tokenizer: Tokenizer, wanted: Continuation, count: int) -> Engine:
    """Return an engine for so many answers; the model can only decode from then on.

    Raises:
        UserError: when the model cannot draft.
    """
    if wanted.speculation is not None:
        wanted.speculation.check(model.config)
    model = prepare_weights(model.to(find_device(wanted.device)))
    ends = {model.config.eos_token_id, *wanted.stop_ids}
    return Engine(
        model,
        ends,
        tokenizer=tokenizer,
        slots=max(1, min(count, SLOTS)),
        speculation=wanted.speculation,
        formats=wanted.formats,
    )


def _shown(text: str) -> str:
    """Return what is printed: a terminal would obey control characters."""
    return printable(text) if sys.stdout.isatty() else text


def _is_text(prompt: str) -> bool:
    """Say whether a word of the command line was UTF-8; Python keeps other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)
