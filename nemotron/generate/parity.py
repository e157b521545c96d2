"""Whether the engine gives tokens the probabilities that the model gives them in training.

Decoding runs other code than training: the recurrence instead of the scan, a cache, packed weights.
A fault in it leaves texts plausible and spoils what is learned from them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import Engine, MambaDecode
from nemotron.generate.exact import exact_view
from nemotron.generate.request import Answer, Request
from nemotron.generate.sampling import Sampling
from nemotron.model.hybrid import HybridLM

LIMIT = 1.05
"""Error from which on something is wrong, as NeMo RL's guide for new models has it."""


@dataclass(frozen=True)
class Parity:
    """How far engine and model are apart for some answers.

    `error` is the mean of exp(|difference of log-probabilities|) over the answers' tokens: 1 where
    both agree. Source: NVIDIA-NeMo/RL: docs/adding-new-models.md (`token_mult_prob_error`).
    """

    length: int
    """Tokens of each prompt."""
    rows: int
    sampled: bool
    error: float
    largest: float
    """Largest difference of two log-probabilities, in nats."""
    is_exact: bool = False
    """Whether there must be no difference at all."""

    @property
    def is_right(self) -> bool:
        """Whether the error is small enough; not so if it is NaN."""
        return self.largest == 0 if self.is_exact else self.error <= LIMIT


def check_parity(
    model: HybridLM,
    lengths: Sequence[int],
    rows: Sequence[int],
    new_tokens: int,
    seed: int = 0,
    mamba_decode: MambaDecode = "recurrent",
) -> Iterator[Parity]:
    """Compare engine and model for each length, number of rows, and greedy and sampled answers.

    The prompts are random tokens. With `replay`, the pass is one of `exact_view(model)`, and every
    bit must be the same.
    """
    is_exact = mamba_decode == "replay"
    view = model if is_exact else decode_view(model, pack=True)
    trained = exact_view(model) if is_exact else model
    generator = torch.Generator().manual_seed(seed)
    for length in lengths:
        for count in rows:
            size = (count, length)
            prompts = torch.randint(model.config.vocab_size, size, generator=generator).tolist()
            for temperature in (0.0, 1.0):
                requests = [
                    Request(tuple(p), new_tokens, Sampling(temperature, seed=k), logprobs=True)
                    for k, p in enumerate(prompts)
                ]
                engine = Engine(view, slots=count, mamba_decode=mamba_decode)
                ended = [event for event in engine.run(requests) if event.finish]
                ended.sort(key=lambda event: event.request)
                found = [
                    _differences(trained, prompt, event.answer)
                    for prompt, event in zip(prompts, ended, strict=True)
                ]
                apart = torch.cat(found).abs()
                error, largest = apart.exp().mean().item(), apart.max().item()
                yield Parity(length, count, temperature > 0, error, largest, is_exact)


@torch.no_grad()
def _differences(model: HybridLM, prompt: list[int], answer: Answer) -> torch.Tensor:
    """Return the engine's log-probabilities less those of one pass through the model."""
    device = model.backbone.embeddings.weight.device
    text = torch.tensor([[*prompt, *answer.tokens]], device=device)
    hidden = model(text[:, :-1])[:, len(prompt) - 1 :]
    found = model.logits(hidden).float().log_softmax(-1)
    expected = found.gather(2, text[:, len(prompt) :, None])[0, :, 0]
    return torch.tensor(answer.raw_logprobs, dtype=torch.float64) - expected.double().cpu()


def report(
    model: HybridLM,
    lengths: Sequence[int],
    rows: Sequence[int],
    new_tokens: int,
    mamba_decode: MambaDecode = "recurrent",
) -> int:
    """Print a line for each comparison; return 1 if the engine is wrong in any, else 0."""
    print(f"{'prompt':>8} {'rows':>5}  {'tokens':<8} {'error':>9} {'largest':>10}")
    code = 0
    for parity in check_parity(model, lengths, rows, new_tokens, mamba_decode=mamba_decode):
        kind = "sampled" if parity.sampled else "greedy"
        numbers = f"{parity.error:>9.6f} {parity.largest:>10.2e}"
        limit = "not 0" if parity.is_exact else f"above {LIMIT}"
        wrong = "" if parity.is_right else f"  {limit}"
        print(f"{parity.length:>8} {parity.rows:>5}  {kind:<8} {numbers}{wrong}", flush=True)
        if not parity.is_right or math.isnan(parity.largest):
            code = 1
    return code
