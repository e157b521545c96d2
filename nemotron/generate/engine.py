"""Decoding with cached states: prompts are read in pieces, then every row grows token by token."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron.errors import UserError
from nemotron.generate.sampling import Sampling, choose, draw_uniforms
from nemotron.model.cache import Cache, CachedRows
from nemotron.model.hybrid import HybridLM


@dataclass
class Timing:
    """Tokens and seconds of the two phases: reading the prompts, and writing after them."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0

    def __str__(self) -> str:
        read = self.prompt_tokens / max(self.prefill_s, 1e-9)
        line = f"prompt {self.prompt_tokens} tokens, {read:,.0f} tokens/s"
        if self.decode_s:
            line += (
                f"; new {self.new_tokens} tokens, {self.new_tokens / self.decode_s:,.1f} tokens/s"
            )
        return line


class Engine:
    """Continues prompts with one model; rows of unequal length are decoded together.

    `stop` are the tokens that end a row. Prompts pass the model in pieces of `prefill_tokens`
    tokens a row, which bounds the memory of a long prompt.
    """

    def __init__(
        self, model: HybridLM, stop: Collection[int] = (), prefill_tokens: int = 512
    ) -> None:
        self.model = model
        self.stop = frozenset(stop)
        self.prefill_tokens = prefill_tokens
        self.timing = Timing()

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> list[list[int]]:
        """Return the new tokens of each prompt, the stop token included where one was reached.

        Raises:
            UserError: when a prompt is empty or holds a token that the model does not have.
        """
        rows: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, max_new_tokens, sampling):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every row as soon as it is known, None for rows that ended.

        Raises:
            UserError: as `generate`, before the first token.
        """
        self._check(prompts, max_new_tokens)
        uniforms = draw_uniforms(prompts, max_new_tokens, sampling)
        if uniforms is not None:
            uniforms = uniforms.to(self.model.backbone.embeddings.weight.device)
        self.timing = Timing(prompt_tokens=sum(map(len, prompts)))
        begin = time.perf_counter()
        rows, logits = self.prefill(prompts)
        running = [True] * len(prompts)
        for index in range(max_new_tokens):
            newest = choose(logits, sampling, None if uniforms is None else uniforms[:, index])
            tokens = newest.tolist()  # the step's one wait for the device
            now = time.perf_counter()
            if index:
                self.timing.decode_s += now - begin
                self.timing.new_tokens += sum(running)
            else:
                self.timing.prefill_s = now - begin
            yield [token if on else None for token, on in zip(tokens, running, strict=True)]
            running = [
                on and token not in self.stop for token, on in zip(tokens, running, strict=True)
            ]
            if not any(running) or index == max_new_tokens - 1:
                return
            begin = time.perf_counter()  # what the caller did with the token is not counted
            logits = self.advance(rows, newest)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[CachedRows, Float[Tensor, "B V"]]:
        """Read the prompts; return the rows after them and the logits of the next token.

        Prompts of one length are read together, so that nothing is padded.
        """
        model, table = self.model, self.model.backbone.embeddings.weight
        dtype = model.compute_dtype or table.dtype
        cache = Cache(model.config, len(prompts), dtype=dtype, device=table.device)
        slots = [cache.admit() for _ in prompts]
        logits = table.new_empty(len(prompts), model.config.vocab_size, dtype=dtype)
        by_length: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(number)
        for numbers in by_length.values():
            rows = cache.rows([slots[number] for number in numbers])
            ids = torch.tensor([list(prompts[n]) for n in numbers], device=table.device)
            for piece in ids.split(self.prefill_tokens, dim=1):
                hidden = model(piece, cache=rows)
            logits[numbers] = model.logits(hidden[:, -1]).to(dtype)
        return cache.rows(slots), logits

    @torch.inference_mode()
    def advance(self, rows: CachedRows, tokens: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        """Append one token to every row; return the logits of the next one."""
        return self.model.logits(self.model(tokens[:, None], cache=rows)[:, 0])

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens} must be at least 1.")
        if not prompts:
            raise UserError("there is no prompt; give at least one.")
        size = self.model.config.vocab_size
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UserError(f"prompt {number} is empty; give it at least one token.")
            if outside := [token for token in prompt if not 0 <= token < size]:
                raise UserError(
                    f"prompt {number} has token {outside[0]}, but the model's vocabulary has "
                    f"{size} tokens; use the tokenizer that the model was trained with."
                )
