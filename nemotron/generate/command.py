"""What `nemotron generate` does once the model is loaded."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace

from nemotron.data.tokenizer import Tokenizer
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import SLOTS, Engine
from nemotron.generate.request import requests_of
from nemotron.generate.sampling import Sampling
from nemotron.generate.speculate import Speculation
from nemotron.model.cache_formats import UNCHANGED, CacheFormats
from nemotron.model.hybrid import HybridLM
from nemotron.terminal import printable


def generate(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    reasoning_budget: int | None = None,
    speculation: Speculation | None = None,
    formats: CacheFormats = UNCHANGED,
    stream: bool,
    device: str,
) -> int:
    """Print each prompt with its continuation, and tokens per second to the error stream.

    One prompt is printed while it grows if `stream` is on; several are printed when all are
    done. Names of special tokens in a prompt, such as `<|im_start|>`, are these tokens. A text
    ends at the model's end of text and at `stop_ids`. With `reasoning_budget`, `</think>` is put
    after so many tokens unless the model wrote it. A terminal gets control characters as escapes,
    a file or pipe as they are. Returns the exit code. The model is moved to `device` and its
    weights are converted for decoding, so it cannot be trained afterwards.

    Raises:
        UserError: when a prompt is empty or a setting is impossible.
    """
    for prompt in prompts:
        if not _is_text(prompt):
            rule = "is not UTF-8 text; give it in that encoding."
            raise UserError(rule, key="prompt", value=repr(prompt))
    budget = None
    if reasoning_budget is not None:
        budget = ReasoningBudget.of(tokenizer, reasoning_budget)
    requests = requests_of(tokenizer.encode_batch(prompts, specials=True), max_new_tokens, sampling)
    requests = [replace(request, stop=tuple(stop), budget=budget) for request in requests]
    for number, request in enumerate(requests, 1):
        request.check(model.config.vocab_size, f"prompt {number}")
    if speculation is not None:
        speculation.check(model.config)
    model = prepare_weights(model.to(find_device(device)))
    ends, slots = {model.config.eos_token_id, *stop_ids}, min(len(requests), SLOTS)
    engine = Engine(
        model, ends, tokenizer=tokenizer, slots=slots, speculation=speculation, formats=formats
    )
    live, answers = stream and len(requests) == 1, dict.fromkeys(range(len(requests)), "")
    shown = printable if sys.stdout.isatty() else str
    if live:
        print(shown(prompts[0]), end="", flush=True)
    for event in engine.run(requests):
        answers[event.request] = event.answer.text
        if live:
            print(shown(event.text), end="", flush=True)
    whole = [prompt + answer for prompt, answer in zip(prompts, answers.values(), strict=True)]
    print("" if live else shown("\n\n".join(whole)))
    print(engine.timing, file=sys.stderr)
    if engine.speculator is not None:
        print(engine.speculator.acceptance, file=sys.stderr)
    return DONE


def _is_text(prompt: str) -> bool:
    """Say whether a word of the command line was UTF-8; Python keeps other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)
