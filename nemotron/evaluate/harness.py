"""Models as lm-evaluation-harness sees them; only this file and its command need that package.

Source: EleutherAI/lm-evaluation-harness: lm_eval/api/model.py, lm_eval/models/huggingface.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nemotron.data.chat.render import render
from nemotron.data.chat.template import TEMPLATE
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.generate.batch import answers_in_order
from nemotron.generate.branches import Scored
from nemotron.generate.engine import Engine
from nemotron.generate.request import Request, requests_of
from nemotron.generate.sampling import Sampling
from nemotron.generate.scoring import ROWS, Scorer
from nemotron.model.hybrid import HybridLM
from nemotron.serve.conversation import ChatFormat
from nemotron.serve.split import END, THINK

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request as text, its context and its continuation as tokens."""

DEFAULT_NEW_TOKENS = 256
"""Longest answer where a task names none, as in lm-eval."""
SLOTS = 64
"""Answers that are written together, unless another number is given."""
PREFIXES = 16
"""States after beginnings of prompts that are kept for others."""
PREFILL_TOKENS = 4096
"""Tokens of prompts that the engine reads between two tokens of the answers."""
SEED = 0
"""Of answers that are drawn; copies of a prompt get different ones."""
KNOWN = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
"""Keys of `generation_kwargs` that go to the sampling."""
NEUTRAL = {"num_beams": 1, "use_cache": True}
"""Other keys, with the value that changes nothing."""


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, and what lies with it."""

    name: str
    model: HybridLM
    """With weights that are prepared for decoding."""
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    chat: ChatFormat | None = None
    template: str | None = None
    """Text of its own chat template; None: ours."""


class HarnessLM(TemplateLM):
    """A model whose probabilities and answers lm-eval asks for.

    `rows` texts are scored at a time, and `slots` answers written. Names of special tokens in a
    text are these tokens, and no token is put in front of it. With
    `thinks` a chat prompt asks for reasoning; with `strips` reasoning is not part of an answer.
    """

    def __init__(
        self,
        subject: Subject,
        rows: int = ROWS,
        slots: int = SLOTS,
        *,
        thinks: bool = True,
        strips: bool = False,
    ) -> None:
        super().__init__()
        self.subject, self._slots = subject, slots
        self._thinks, self._strips = thinks, strips
        self._scorer = Scorer(subject.model, rows)
        self._encode = lru_cache(maxsize=8)(self._tokens)  # choices have their context in common

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.subject.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token before a text without context: that which begins texts, if there is one."""
        begin = self.subject.model.config.bos_token_id
        has_begin = self.subject.tokenizer.token(begin) is not None
        return begin if has_begin else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Most tokens of a text that are read."""
        return self.subject.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps requests."""
        return f"{self.subject.name}-{self.subject.tokenizer.hash}".replace("/", "__")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,  # Any: of other tokenizers
    ) -> list[int]:
        """Return the tokens of a text."""
        return list(self._encode(string))

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.subject.tokenizer.encode(text, specials=True))

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log-probability of each continuation, and whether it is the likeliest one."""
        texts, places = [], []
        for place, (_text, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a text to be scored has {len(continuation):,} tokens, but the model reads at "
                    f"most {self.max_length:,}; leave the task out."
                )
            if continuation:
                tokens = tuple([*context, *continuation][-self.max_length - 1 :])
                texts.append(Scored(tokens, len(tokens) - len(continuation)))
                places.append(place)
        results = [(0.0, True)] * len(requests)
        with tqdm(total=len(texts), desc="scored texts", disable=disable_tqdm) as bar:
            scores = self._scorer.score(texts, bar.update)
        for place, score in zip(places, scores, strict=True):
            results[place] = (score.logprob, score.is_greedy)
        for (text, *_tokens), result in zip(requests, results, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each whole text, in windows of the model's length."""
        windows: list[Encoded] = []
        owners = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop strings."""
        wanted = [Wanted.of(*request.args) for request in requests]
        # neighbors then begin alike, and answers with one setting have different seeds
        order = sorted(
            range(len(wanted)), key=lambda i: (repr(wanted[i].settings), wanted[i].prompt)
        )
        asked = self._requests([wanted[i] for i in order])
        engine = Engine(
            self.subject.model,
            self.subject.stop_ids,
            PREFILL_TOKENS,
            tokenizer=self.subject.tokenizer,
            slots=min(self._slots, max(1, len(asked))),
            prefixes=PREFIXES,
            common_pieces=True,
        )
        results = [""] * len(wanted)
        bar = tqdm(order, desc="answers", disable=disable_tqdm)
        for place, answer in zip(bar, answers_in_order(engine, asked), strict=True):
            text = self._answer(wanted[place], answer.tokens)
            results[place] = text
            self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return results

    def _requests(self, wanted: Sequence["Wanted"]) -> list[Request]:
        """Return what the engine is asked; long prompts lose their beginning."""
        found: list[Request] = []
        for one in wanted:
            room = self.max_length - one.max_tokens
            if room < 1:
                raise UserError(
                    f"must be below {self.max_length:,}, the length of the model's texts.",
                    key="max_gen_toks",
                    value=one.max_tokens,
                )
            tokens = self._tokens(one.prompt)[-room:] or (self.prefix_token_id,)
            # stop strings are those of the answer, not of the reasoning before it
            stop = () if self._strips else one.stop
            found.append(Request(tokens, one.max_tokens, one.sampling, stop=stop))
        return _with_seeds(found)

    def _answer(self, wanted: "Wanted", tokens: Sequence[int]) -> str:
        tokenizer = self.subject.tokenizer
        if not self._strips:
            text = tokenizer.decode(tokens, skip_specials=True)
            return str(postprocess_generated_text(text, list(wanted.stop), None))
        marks = self.subject.chat.marks if self.subject.chat is not None else {}
        pieces: list[str] = []
        shown: list[int] = []
        for token in tokens:
            if token in marks:
                pieces += [tokenizer.decode(shown, skip_specials=True), marks[token]]
                shown = []
            else:
                shown.append(token)
        text = "".join([*pieces, tokenizer.decode(shown, skip_specials=True)])
        text = strip_reasoning(text, begun=wanted.prompt.rstrip().endswith(THINK))
        return str(postprocess_generated_text(text, list(wanted.stop), None))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, up to the answer, or up to the end of its last message.

        Raises:
            UserError: when the model knows no conversations, or its template refuses this one.
        """
        chat = self.subject.chat
        if chat is None:
            raise UserError("has no chat template; leave --chat out.", where=self.subject.name)
        try:
            text = render(
                chat_history,
                enable_thinking=self._thinks,
                add_generation_prompt=add_generation_prompt,
                template=chat.template,
            ).text
        except (TemplateError, TypeError, AssertionError) as error:
            raise UserError(f"the chat template refuses a conversation: {error}.") from None
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"].strip()
        return text[: text.rindex(begun) + len(begun)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the text of the chat template."""
        return (self.subject.template or TEMPLATE) if chat_template else None


@dataclass(frozen=True)
class Wanted:
    """A prompt, and how it is to be answered."""

    prompt: str
    stop: tuple[str, ...]
    max_tokens: int
    sampling: Sampling

    @property
    def settings(self) -> tuple[object, ...]:
        """All but the prompt."""
        return self.stop, self.max_tokens, self.sampling

    @classmethod
    def of(cls, prompt: str, settings: dict[str, Any]) -> "Wanted":  # Any: of a task's YAML
        """Read the `generation_kwargs` of a task.

        Raises:
            UserError: when one of them is unknown here.
        """
        values: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS))
        stop = tuple(text for text in values.pop("until") if text)
        most, draws = values.pop("max_gen_toks"), values.pop("do_sample", False)
        for key, value in values.items():
            if key not in KNOWN and NEUTRAL.get(key, ...) != value:
                raise UserError(
                    f"is unknown; use {', '.join(sorted(KNOWN))}.",
                    key=f"generation_kwargs.{key}",
                    value=value,
                )
        own = {key: value for key, value in values.items() if key in KNOWN and value is not None}
        sampling = Sampling(**own) if draws else Sampling(**{**own, "temperature": 0.0})
        return cls(prompt, stop, most, sampling)


def _with_seeds(requests: Sequence[Request]) -> list[Request]:
    """Give copies of a prompt different seeds, which another prompt does not change."""
    if not requests:
        return []
    drawn = requests_of([request.prompt for request in requests], 1, Sampling(seed=SEED))
    return [
        replace(request, sampling=replace(request.sampling, seed=one.sampling.seed))
        for request, one in zip(requests, drawn, strict=True)
    ]


def strip_reasoning(text: str, *, begun: bool) -> str:
    """Return what follows the reasoning; nothing if it has no end.

    `begun` says that the prompt ended inside the reasoning.
    """
    _, end, answer = text.rpartition(END)
    if end:
        return answer.lstrip()
    return "" if begun or THINK in text else text
