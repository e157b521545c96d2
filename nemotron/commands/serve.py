"""Commands that answer: an HTTP server, and a conversation in the terminal."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron.commands.answers import AnswerOptions
from nemotron.commands.decoding import DecodingOptions
from nemotron.commands.shared import CommandGroup, Device, Model
from nemotron.limits import MOST_TOKENS

if TYPE_CHECKING:
    from nemotron.data.tokenizer import Tokenizer
    from nemotron.model.hybrid import HybridLM
    from nemotron.serve.console import Tools
    from nemotron.serve.conversation import ChatFormat

app = CommandGroup()

INSTALL = "pip install 'nemotron-train[serve]'"

Length = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a prompt and its answer; default: the model's longest."),
]


@app.command(epilog="Example: nemotron serve runs/tiny --port 8000")
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Name or address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="NEMOTRON_API_KEY", help="Key that every request must bear."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; default: its folder's.")
    ] = None,
    slots: Annotated[
        int, typer.Option(min=1, max=4096, help="Answers that are written at the same time.")
    ] = 32,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens whose keys and values are kept; default: as needed."),
    ] = None,
    prefixes: Annotated[
        int, typer.Option(min=0, help="Beginnings of texts whose states are kept.")
    ] = 16,
    max_length: Length = None,
    max_answer: Annotated[
        int, typer.Option(min=1, help="Tokens of an answer whose request says nothing.")
    ] = 4096,
    max_open: Annotated[
        int, typer.Option(min=1, help="Answers that may be written or wait; more get 429.")
    ] = 256,
    max_body_kib: Annotated[
        int, typer.Option(min=1, help="Size of a request; larger ones get 413.")
    ] = 4096,
    grace: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that open answers get at the end.")
    ] = 10.0,
    device: Device = "auto",
    *,
    decoding: DecodingOptions,
) -> int:
    """Serve a model over HTTP, with OpenAI's interface and a chat page."""
    from nemotron import __version__
    from nemotron.errors import UserError

    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs the package {package}; install it with: {INSTALL}.")
    from nemotron.generate.budget import find_line_ends
    from nemotron.generate.engine import Engine
    from nemotron.model.cache import BLOCK_SIZE
    from nemotron.serve.command import Address
    from nemotron.serve.command import serve as run
    from nemotron.serve.grammar import JsonForms
    from nemotron.serve.limits import Limits
    from nemotron.serve.translate import Translator
    from nemotron.serve.worker import Worker

    address = Address(host, port, api_key)
    speculation, formats = decoding.speculation, decoding.formats
    loaded, tokenizer, chat_format = _load(model, device)
    limits = Limits(
        max_length or loaded.config.max_position_embeddings,
        answer=max_answer,
        open_answers=max_open,
        body_bytes=max_body_kib << 10,
    )
    if kv_tokens is not None:  # more than all answers can have are never used
        kv_tokens = min(kv_tokens, slots * limits.length)
    engine = Engine(
        loaded,
        {loaded.config.eos_token_id},
        tokenizer=tokenizer,
        slots=slots,
        blocks=None if kv_tokens is None else -(-kv_tokens // BLOCK_SIZE),
        prefixes=prefixes,
        speculation=speculation,
        formats=formats,
    )
    find_line_ends(tokenizer)  # takes a moment, which no request should wait for
    ends = {loaded.config.eos_token_id} | (chat_format.stop_ids if chat_format else set())
    forms = JsonForms(tokenizer, loaded.config.vocab_size, frozenset(ends))
    translator = Translator(tokenizer, loaded.config.vocab_size, chat_format, limits, forms)
    own_name = name or model.resolve().name
    return run(Worker(engine), translator, own_name, address, grace_s=grace, version=__version__)


@app.command(epilog="Example: nemotron chat runs/tiny --think-budget 200")
def chat(
    model: Model,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Largest number of tokens of an answer.")
    ] = 1024,
    think: Annotated[bool, typer.Option(help="Let answers begin with reasoning.")] = True,
    calculator: Annotated[
        bool, typer.Option("--calculator", help="Offer a calculator, and run its calls.")
    ] = False,
    max_length: Length = None,
    device: Device = "auto",
    *,
    answers: AnswerOptions,
    decoding: DecodingOptions,
) -> int:
    """Hold a conversation with a model in the terminal."""
    from nemotron.errors import UserError
    from nemotron.generate.budget import ReasoningBudget
    from nemotron.generate.engine import Engine
    from nemotron.serve.console import Conversation, Manner, Tools
    from nemotron.serve.console import chat as run

    sampling = answers.sampling
    speculation, formats = decoding.speculation, decoding.formats
    loaded, tokenizer, chat_format = _load(model, device)
    if chat_format is None:
        raise UserError(
            "has learned no chat format: its tokenizer has no token <|im_end|>, and no "
            "chat_template.jinja lies with it; use nemotron generate.",
            where=str(model),
        )
    tokens = answers.think_budget
    budget = None if tokens is None else ReasoningBudget.of(tokenizer, tokens)
    stop = tuple(answers.stop or ())
    tools = _calculator() if calculator else Tools()
    manner = Manner(sampling, max_new_tokens, stop, system, think, budget, tools)
    ends = {loaded.config.eos_token_id}
    engine = Engine(
        loaded,
        ends,
        tokenizer=tokenizer,
        slots=1,
        prefixes=4,
        speculation=speculation,
        formats=formats,
    )
    length = max_length or loaded.config.max_position_embeddings
    return run(Conversation(engine, chat_format, manner, length))


def _calculator() -> "Tools":
    """Return the calculator of the environments."""
    from nemotron.posttrain.environments import desk
    from nemotron.serve.console import Tools

    own = [tool for tool in desk.specifications() if tool["name"] == "calculate"]
    return Tools(own, lambda name, arguments: desk.run_tool({}, name, arguments))


def _load(path: Path, device: str) -> "tuple[HybridLM, Tokenizer, ChatFormat | None]":
    """Return a model that can only decode, its tokenizer, and its chat format if it has one."""
    from nemotron.device import find_device
    from nemotron.generate.decode_layers import prepare_weights
    from nemotron.loading import load_with_tokenizer, read_chat_files, recipe_ops
    from nemotron.serve.conversation import ChatFormat

    where = find_device(device)
    model, tokenizer = load_with_tokenizer(path, ops=recipe_ops(path))
    files = read_chat_files(path)
    chat_format = ChatFormat.of(tokenizer, files.template, files.stop_ids)
    return prepare_weights(model.to(where)), tokenizer, chat_format
