"""Requests of OpenAI's Responses interface, each as the request for a chat that it means."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from nemotron.serve.response_input import messages_of
from nemotron.serve.schemas import (
    FUNCTION_NAME,
    ChatRequest,
    Count,
    FunctionName,
    NamedSchema,
    ResponseFormat,
    SchemaName,
    Strict,
    ToolChoice,
)


class Reasoning(Strict):
    """How long the reasoning is."""

    effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    summary: None = None


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: SchemaName = "answer"
    description: str | None = None
    strict: bool | None = None
    own: dict[str, JsonValue] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.own is not None) != (self.type == "json_schema"):
            raise ValueError('schema must be given with the type "json_schema", and no other')
        return self

    def chat(self) -> ResponseFormat:
        """Return it as a request for a chat has it."""
        own = None
        if self.own is not None:
            own = NamedSchema(name=self.name, strict=self.strict, schema=self.own)
        return ResponseFormat(type=self.type, json_schema=own)


class TextOptions(Strict):
    """What the text of the answer is."""

    format: TextFormat = TextFormat(type="text")


class Choice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=FUNCTION_NAME)]


class ResponsesRequest(Strict):
    """A conversation to be answered; nothing is stored, so it comes as a whole."""

    model: str
    input: str | Annotated[list[dict[str, JsonValue]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stream: bool | None = None
    tools: list[dict[str, JsonValue]] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    metadata: dict[str, Any] | None = None  # Any: JSON of the client
    """The client's own; it changes nothing, as do the next four."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    previous_response_id: str | None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    """It changes nothing: reasoning is returned as text, and taken back as text."""

    @field_validator("previous_response_id")
    @classmethod
    def _is_absent(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError("no response is stored here; send its items in input")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a count of tokens; its last event has one in any case."""
        return False

    def chat(self) -> ChatRequest:
        """Return the request for a chat with the same answer.

        Raises:
            ApiError: when an item of the input is of no known kind.
            ValidationError: when a number is one that a chat refuses.
        """
        effort = None if self.reasoning is None else self.reasoning.effort
        choice: Any = self.tool_choice  # Any: a word or an object
        if isinstance(choice, Choice):
            choice = ToolChoice(type="function", function=FunctionName(name=choice.name))
        return ChatRequest(
            model=self.model,
            messages=messages_of(self.input, self.instructions),
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            tools=None if self.tools is None else [_tool(tool) for tool in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort="low" if effort == "minimal" else effort,
            response_format=None if self.text is None else self.text.format.chat(),
        )


def _tool(tool: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a tool as a request for a chat has it."""
    shown = ("name", "description", "parameters")
    function = {key: tool[key] for key in shown if tool.get(key) is not None}
    return {"type": tool.get("type"), "function": function}
