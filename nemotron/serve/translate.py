"""A client's request to those of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.data.chat.calls import begin_call
from nemotron.data.chat.check import Message
from nemotron.data.tokenizer import Tokenizer
from nemotron.errors import UserError
from nemotron.generate.budget import ReasoningBudget
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.serve.conversation import ChatFormat, ChatPrompt, Turn
from nemotron.serve.errors import ApiError
from nemotron.serve.grammar import INSTALL, JsonForm, JsonForms, is_installed
from nemotron.serve.limits import Limits
from nemotron.serve.schemas import ChatRequest, Common, CompletionRequest

SHORT_ANSWER = 16
"""Tokens of a completion whose request says nothing, as OpenAI has it."""
FIELDS = {"stop_ids": "stop_token_ids"}
"""A client's fields by those of a request of the engine, where they have other names."""
EFFORTS = {"low": "low", "medium": "efficient"}
"""OpenAI's names of the efforts that the chat template knows."""


@dataclass(frozen=True)
class Translator:
    """Knows the model, and what may be asked of it."""

    tokenizer: Tokenizer
    vocab_size: int
    chat: ChatFormat | None
    limits: Limits
    forms: JsonForms

    def completion(self, asked: CompletionRequest) -> list[Request]:
        """Return one request for each prompt.

        Raises:
            ApiError: when the request asks for something impossible.
        """
        prompts = asked.prompts
        if len(prompts) > self.limits.prompts:
            raise ApiError(
                *(400, f"prompt has {len(prompts)} texts; give at most {self.limits.prompts}."),
                param="prompt",
            )
        most = SHORT_ANSWER if asked.max_tokens is None else asked.max_tokens
        if most == 0 and not asked.echo:
            raise ApiError(
                *(400, "max_tokens = 0 leaves no text without echo = true; give at least 1."),
                param="max_tokens",
            )
        form = self._form(asked, after_reasoning=False)
        requests = [
            self._request(
                asked,
                self.tokens(prompt),
                most,
                stop_ids=frozenset() if form is None else form.stop_ids,
                top_logprobs=asked.logprobs,
                prompt_logprobs=asked.prompt_logprobs,
                form=form,
            )
            for prompt in prompts
        ]
        self._check_echo(asked, requests)
        return requests

    def _check_echo(self, asked: CompletionRequest, requests: Sequence[Request]) -> None:
        if asked.prompt_logprobs is None:
            return
        num_places = sum(len(request.prompt) * request.num_samples for request in requests)
        count, most = num_places * (1 + asked.prompt_logprobs), self.limits.echoed
        if count > most:
            raise ApiError(
                400,
                f"echo would report {count} log-probabilities of prompts; ask for at most {most}, "
                "with fewer prompts, or a smaller logprobs or n.",
                param="echo",
            )

    def answer(self, asked: ChatRequest) -> tuple[Request, bool]:
        """Return the request for an answer, and whether it begins with reasoning.

        Raises:
            ApiError: when the request asks for something impossible.
        """
        _check_choice(asked)
        effort = EFFORTS.get(asked.reasoning_effort or "")
        options = asked.chat_template_kwargs
        turn = Turn(
            asked.thinks,
            not options.truncate_history_thinking,
            effort,  # type: ignore[arg-type]  # a value of EFFORTS
            options.reasoning_budget,
        )
        tools = None if asked.tool_choice == "none" else asked.tools
        prompt = self.conversation(asked.messages, tools, turn)
        assert self.chat is not None, "no prompt without a chat format"
        forced: Sequence[int] = ()
        if asked.forced_call is not None:
            forced = self.tokenizer.encode(begin_call(asked.forced_call or None), specials=True)
        most = asked.max_tokens or asked.max_completion_tokens
        if most is None:
            room = self.limits.length - len(prompt.tokens)
            most = max(1, min(self.limits.answer, room))
        request = self._request(
            asked,
            prompt.tokens,
            most,
            forced=tuple(forced),
            stop_ids=frozenset() if asked.ignore_eos else self.chat.stop_ids,
            top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            form=self._form(asked, after_reasoning=prompt.thinks),
            thinks=prompt.thinks,
        )
        return request, prompt.thinks

    def conversation(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        turn: Turn,
    ) -> ChatPrompt:
        """Return the tokens of a conversation.

        Raises:
            ApiError: when it is impossible, or the model has learned no chat format.
        """
        if self.chat is None:
            raise ApiError(400, "this model has learned no chat format; use /v1/completions.")
        try:
            return self.chat.prompt(messages, tools, turn)
        except ValueError as error:
            sentence = " ".join(str(error).split())
            param = "tools" if sentence.startswith("tools") else "messages"
            raise ApiError(400, sentence, param=param) from None

    def _form(self, asked: Common, *, after_reasoning: bool) -> JsonForm | None:
        schema = asked.schema_of_answer
        if schema is None:
            return None
        if not is_installed():
            raise ApiError(
                400,
                "answers of a given form need the package llguidance beside the server; install "
                f"it there with: {INSTALL}.",
                param="response_format",
            )
        try:
            return self.forms.form(schema, after_reasoning=after_reasoning)
        except ValueError as error:
            raise ApiError(
                400, f"the schema cannot be followed: {error}.", param="response_format"
            ) from None

    def tokens(self, prompt: str | list[int]) -> Sequence[int]:
        """Return a prompt's tokens; names of special tokens in a text are these tokens."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, specials=True)
        return prompt

    def _request(
        self,
        asked: Common,
        prompt: Sequence[int],
        most: int,
        *,
        forced: tuple[int, ...] = (),
        stop_ids: frozenset[int] = frozenset(),
        top_logprobs: int | None,
        prompt_logprobs: int | None = None,
        form: JsonForm | None,
        thinks: bool = True,
    ) -> Request:
        if (asked.n or 1) > self.limits.samples:
            raise ApiError(
                400, f"n = {asked.n} must be at most {self.limits.samples} here.", param="n"
            )
        if len(prompt) + most > self.limits.length:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and max_tokens is {most}, but the model "
                f"takes {self.limits.length} together; ask for fewer.",
                code="context_length_exceeded",
            )
        budget = None
        if asked.reasoning_budget is not None and thinks:
            budget = ReasoningBudget.of(self.tokenizer, asked.reasoning_budget)
        try:
            request = Request(
                tuple(prompt),
                most,
                _sampling(asked),
                num_samples=asked.n or 1,
                stop_ids=stop_ids.union(asked.stop_token_ids or ()),
                stop=asked.stops,
                include_stop_str_in_output=bool(asked.include_stop_str_in_output),
                min_tokens=asked.min_tokens or 0,
                ignore_eos=bool(asked.ignore_eos),
                skip_special_tokens=asked.skip_special_tokens is not False,
                forced=forced,
                budget=budget,
                logprobs=top_logprobs is not None,
                top_logprobs=top_logprobs or 0,
                prompt_logprobs=prompt_logprobs,
                grammar=form,
            )
            request.check(self.vocab_size)
        except UserError as error:
            error = error.renamed(FIELDS)
            param = error.finding.key if error.finding.key in type(asked).model_fields else None
            raise ApiError(400, str(error), param=param) from None
        return request


def _sampling(asked: Common) -> Sampling:
    bias = {int(token): value for token, value in (asked.logit_bias or {}).items()}
    return Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k if (asked.top_k or 0) > 0 else None,
        top_p=asked.top_p,
        seed=asked.seed,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty or 1.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=bias,
    )


def _check_choice(asked: ChatRequest) -> None:
    if asked.max_tokens and asked.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens are both given; give one.")
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(
            *(400, "top_logprobs needs logprobs = true; give both."), param="top_logprobs"
        )
    if asked.schema_of_answer is not None and asked.tools and asked.tool_choice != "none":
        raise ApiError(
            400,
            "tools and a response_format are both given, but a call has a form of its own; leave "
            "one out, or give tool_choice = none.",
            param="response_format",
        )
    if asked.forced_call is None:
        return
    names = [_name(tool) for tool in asked.tools or []]
    if not names:
        raise ApiError(
            400, "tool_choice asks for a call, but there are no tools; give some.", param="tools"
        )
    if asked.forced_call and asked.forced_call not in names:
        raise ApiError(
            400,
            f"tool_choice names {asked.forced_call}, which is not among the tools; name one that "
            "is.",
            param="tool_choice",
        )


def _name(tool: object) -> object:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None
