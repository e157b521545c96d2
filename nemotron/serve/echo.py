"""Prompts that lead their answers, with the log-probabilities of their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.data.tokenizer import Tokenizer
from nemotron.generate.request import PromptLogprobs, Request, TokenScore
from nemotron.generate.text import REPLACEMENT
from nemotron.serve.schemas import CompletionRequest
from nemotron.serve.scored import Scored

LONGEST_CHARACTER = 8
"""Tokens after which bytes that are not yet a character will not become one."""


@dataclass(frozen=True)
class Echo:
    """A prompt as the first part of an answer."""

    text: str
    tokens: Sequence[int]
    begins: Sequence[int]
    """Where in the text each token begins; empty where no log-probabilities were asked for."""

    def scored(self, found: PromptLogprobs | None) -> list[Scored]:
        """Return the tokens with what the model thinks of them; nothing follows the first one."""
        if found is None or not self.begins:
            return []
        scored = [Scored(self.tokens[0], None, 0, ())]
        rows = zip(
            *(self.tokens[1:], self.begins[1:], found.logprobs.tolist()),
            *(found.top_tokens.tolist(), found.top_logprobs.tolist()),
            strict=True,
        )
        for token, begin, logprob, ids, values in rows:
            top = [TokenScore(*pair) for pair in zip(ids, values, strict=True)]
            scored.append(Scored(token, logprob, begin, top))
        return scored


def echoes(
    asked: CompletionRequest, requests: Sequence[Request], tokenizer: Tokenizer
) -> list[Echo]:
    """Return each prompt as its answers repeat it; none if they do not.

    A text is repeated as it was sent, and names of special tokens are part of that of tokens.
    """
    if not asked.echo:
        return []
    return [
        Echo(
            given if isinstance(given, str) else tokenizer.decode(request.prompt),
            request.prompt,
            [] if asked.logprobs is None else begins_of(request.prompt, tokenizer),
        )
        for given, request in zip(asked.prompts, requests, strict=True)
    ]


def begins_of(tokens: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Return where in the text of the tokens each of them begins.

    Tokens inside a character begin where it does.
    """
    begins: list[int] = []
    length = context = shown = 0
    for end in range(1, len(tokens) + 1):
        begins.append(length)
        # tokens are decoded with those before them: alone, many tokenizers drop a leading space
        known, text = (tokenizer.decode(tokens[context:stop]) for stop in (shown, end))
        if text.endswith(REPLACEMENT) and end - shown < LONGEST_CHARACTER:
            continue
        length += len(text) - len(known)
        context, shown = shown, end
    return begins
