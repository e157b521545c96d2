"""The requests of OpenAI's interface: which fields there are, and what they may be."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

SMALLEST_TEMPERATURE = 1e-3
"""Below it numbers overflow, and the likeliest token is the only one anyway."""
MOST_TOP = 20
"""Likeliest tokens that can be asked for, as OpenAI has it."""
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"

Schema = dict[str, Any] | bool  # Any: JSON
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
SchemaName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Count = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    """An object whose every field is known, and of exactly its type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream brings beside the answer."""

    include_usage: bool = False
    """Whether the last chunk counts the tokens."""


class NamedSchema(Strict):
    """A schema with its name, which changes nothing."""

    name: SchemaName
    description: str | None = None
    strict: bool | None = None
    """Answers always follow the schema."""
    own: dict[str, JsonValue] | bool = Field(alias="schema")


class ResponseFormat(Strict):
    """The form of the answer: free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError('json_schema must be given with the type "json_schema", and no other')
        return self

    @property
    def form(self) -> Schema | None:
        """The schema of the answer; None for free text."""
        if self.json_schema is not None:
            return self.json_schema.own
        return {"type": "object"} if self.type == "json_object" else None


class Common(Strict):
    """What both kinds of requests have."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        dict[
            Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]
        ]
        | None
    ) = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    """Who asks; it changes nothing, as do the next three."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """0 and -1 keep all, as they do for other servers."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    reasoning_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Tokens after which the reasoning is closed."""

    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Tokens that come before the one that may end the answer; vLLM's name, as the next four."""
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = None
    """Tokens that end the answer, too."""
    include_stop_str_in_output: bool | None = None
    """Whether the text ends with what ended it: the stop string, or the text of the token."""
    ignore_eos: bool | None = None
    """Whether neither the end of text nor that of a turn ends the answer."""
    skip_special_tokens: bool | None = None
    """Whether names of special tokens are left out of the text; without it they are."""

    @field_validator("temperature")
    @classmethod
    def _is_drawable(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < SMALLEST_TEMPERATURE:
            raise ValueError(f"it must be 0 or at least {SMALLEST_TEMPERATURE}")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def schema_of_answer(self) -> Schema | None:
        """What the answer must be; None for free text."""
        return None if self.response_format is None else self.response_format.form

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Common):
    """A text, or several, to be continued."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """0 only with `echo`."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    """How many of the likeliest tokens are reported at each place, beside the chosen one."""
    echo: bool | None = None
    """Whether the prompt leads the answer, in the text and among the log-probabilities."""
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompt_logprobs(self) -> int | None:
        """How many of the likeliest tokens are reported in places of the prompt, if it is read for
        that, or for nothing else."""
        if not self.echo:
            return None
        return 0 if self.logprobs is None and self.max_tokens == 0 else self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [part for part in self.prompt if isinstance(part, int)]
        return [tokens] if tokens else [p for p in self.prompt if not isinstance(p, int)]


class TemplateOptions(Strict):
    """Options of the chat template."""

    enable_thinking: bool = True
    truncate_history_thinking: bool = True
    reasoning_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Stated in the prompt; the field of that name in the request is what is enforced."""


class FunctionName(Strict):
    """A function by its name."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]


class ToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Common):
    """A conversation to be answered."""

    messages: list[dict[str, JsonValue]]
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """Whether several calls may be returned; without it the first is."""
    max_completion_tokens: Count | None = None
    """Newer name of `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    """How many of the likeliest tokens are reported at each place; needs `logprobs`."""
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    metadata: dict[str, Any] | None = None  # Any: JSON of the client
    """The client's own; it changes nothing."""
    store: Literal[False] | None = None
    """Nothing is stored."""

    @property
    def forced_call(self) -> str | None:
        """The function that must be called; empty for any."""
        if isinstance(self.tool_choice, ToolChoice):
            return self.tool_choice.function.name
        if self.tool_choice != "required":
            return None
        return _only_name(self.tools or [])

    @property
    def thinks(self) -> bool:
        """Whether the answer begins with reasoning; one that must be a call does not."""
        wanted = self.chat_template_kwargs.enable_thinking and self.reasoning_effort != "none"
        return wanted and self.forced_call is None


def _only_name(tools: Sequence[dict[str, JsonValue]]) -> str:
    function = tools[0].get("function", tools[0]) if len(tools) == 1 else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
