"""Texts and conversations as the tokens that the model reads, and tokens as text."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from nemotron.hf.tokenizer_files import special_ids
from nemotron.model.config import ModelConfig
from nemotron.serve.conversation import Turn
from nemotron.serve.errors import ApiError
from nemotron.serve.schemas import Strict, TemplateOptions, Token
from nemotron.serve.translate import Translator

Json = dict[str, Any]  # Any: JSON


class TokenizeRequest(Strict):
    """A text or a conversation; the fields are those of vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, JsonValue]] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    add_generation_prompt: bool = True
    """Whether a conversation ends with the beginning of an answer."""
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    return_token_strs: bool | None = None
    """Whether the names of the tokens in the vocabulary are returned, too."""
    add_special_tokens: bool | None = None
    """It changes nothing: the model reads a prompt without tokens around it."""
    continue_final_message: Literal[False] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("it must have either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """Tokens whose text is wanted."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=1 << 20)]


def tokenize(translator: Translator, asked: TokenizeRequest) -> Json:
    """Return the tokens that a completion or a chat of the same content begins with.

    Raises:
        ApiError: when the conversation is impossible, or the model knows none.
    """
    if asked.prompt is not None:
        tokens = list(translator.tokens(asked.prompt))
    else:
        options = asked.chat_template_kwargs
        turn = Turn(
            options.enable_thinking,
            not options.truncate_history_thinking,
            stated_budget=options.reasoning_budget,
            is_opened=asked.add_generation_prompt,
        )
        tokens = list(translator.conversation(asked.messages or [], asked.tools, turn).tokens)
    found: Json = {
        "count": len(tokens),
        "max_model_len": translator.limits.length,
        "tokens": tokens,
        "token_strs": None,
    }
    if asked.return_token_strs:
        found["token_strs"] = [translator.tokenizer.token(token) or "" for token in tokens]
    return found


def tokenizer_info(translator: Translator, config: ModelConfig) -> Json:
    """Return the names of the tokens that have a role, and the chat template, if there are any.

    They have the names of `tokenizer_config.json`, as with vLLM.
    """
    found = special_ids(translator.tokenizer, config).items()
    names = {
        key.removesuffix("_id"): None if token is None else translator.tokenizer.token(token)
        for key, token in found
    }
    template = None if translator.chat is None else translator.chat.template_text
    return {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": template}


def detokenize(translator: Translator, asked: DetokenizeRequest) -> Json:
    """Return the text of tokens, names of special tokens included.

    Raises:
        ApiError: when the model has no such token.
    """
    for place, token in enumerate(asked.tokens):
        if token >= translator.vocab_size:
            raise ApiError(
                400,
                f"tokens[{place}] = {token} is not in the vocabulary; give numbers below "
                f"{translator.vocab_size}.",
                param="tokens",
            )
    return {"prompt": translator.tokenizer.decode(asked.tokens)}
