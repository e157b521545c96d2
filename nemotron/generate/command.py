"""What `nemotron generate` does once the model is loaded."""

import sys
from collections.abc import Sequence

from nemotron.data.tokenizer import Tokenizer
from nemotron.device import find_device
from nemotron.errors import UserError
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import Engine
from nemotron.generate.sampling import Sampling
from nemotron.generate.text import TextStream
from nemotron.model.hybrid import HybridLM


def generate(
    model: HybridLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stream: bool = True,
    device: str = "auto",
) -> int:
    """Print each prompt with its continuation, and tokens per second to the error stream.

    One prompt is printed while it grows if `stream` is on; several are printed when all are
    done. Returns the exit code. The model is moved to `device` and its weights are converted for
    decoding, so it cannot be trained afterwards.

    Raises:
        UserError: when a prompt is empty or a setting is impossible.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    for prompt in prompts:
        if not _is_text(prompt):
            raise UserError(f"prompt = {prompt!r} is not UTF-8 text; give it in that encoding.")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    engine = Engine(prepare_weights(model.to(find_device(device))), {model.config.eos_token_id})
    rows = [TextStream(tokenizer, prompt) for prompt in ids]
    texts = list(prompts)
    live, shown = stream and len(ids) == 1, 0
    for tokens in engine.stream(ids, max_new_tokens, sampling):
        for index, token in enumerate(tokens):
            if token is not None:
                texts[index] += rows[index].push(token)
        if live:
            print(texts[0][shown:], end="", flush=True)
            shown = len(texts[0])
    texts = [text + row.close() for text, row in zip(texts, rows, strict=True)]
    print(texts[0][shown:] if live else "\n\n".join(texts))
    print(engine.timing, file=sys.stderr)
    return 0


def _is_text(prompt: str) -> bool:
    """Say whether a word of the command line was UTF-8; Python keeps other bytes as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in prompt)
