"""Readers that the fuzzer calls beside commands: servers, a conversation, rows of environments."""

import functools
import http.client
import io
import json
import os
import sys
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFUSED = (400, 404, 413, 422)
"""What a server answers to a request that it refuses."""
ENVIRONMENTS = ("arith_chain", "if_constraints", "json_schema", "long_context", "mcqa",
                "text_to_sql", "tool_calc_db")  # fmt: skip
"""Those that judge in bounded time in the process of the server."""
ANSWER = 'It is \\boxed{A}, or {"a": [1]}, or SELECT 1.'


def run_command(words: list[str]) -> int:
    """Run a command of the command line."""
    from nemotron import cli

    return cli.run([*words, "--debug"] if "--debug" in sys.argv else words)


def converse(words: list[str]) -> int:
    """Run a command that reads two messages."""
    sys.stdin = io.StringIO("Is it wet?\nWhy?\n")
    return run_command(words)


def name_model(words: list[str]) -> int:
    """Run a command with the name of a model that stands in a file; the Hub is not asked."""
    name = Path("name.txt").read_bytes().replace(b"\0", b"").decode(errors="surrogateescape")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return run_command([word.replace("NAME", name) for word in words])


def ask_server(words: list[str]) -> int:
    """Post a file to a server of the trained run, which lives as long as this process."""
    path, file = words
    headers = {"Content-Type": "application/json"}
    answer = _model_server().post(path, content=Path(file).read_bytes(), headers=headers)
    return _code(answer.status_code, answer.content)


def judge(words: list[str]) -> int:
    """Post each line of a file to its environment's server; the largest code is the result."""
    codes = [0]
    for line in Path(words[0]).read_bytes().splitlines():
        environment, path, body = _parts(line)
        server = _environment_server(environment)
        connection = http.client.HTTPConnection(*server, timeout=30)
        try:
            address = "/" + urllib.parse.quote(path, errors="replace")
            connection.request("POST", address, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            codes.append(_code(answer.status, answer.read()))
        except http.client.HTTPException as error:
            print(f"{environment}: no answer: {error!r}")
            return 70
        finally:
            connection.close()
    return max(codes)


def draw_tasks(words: list[str]) -> int:
    """Write the prompts of the first rollout batch of a recipe."""
    from nemotron.errors import UserError
    from nemotron.posttrain.config import RlConfig
    from nemotron.posttrain.tasks import Tasks
    from nemotron.recipe.load import load_recipe

    try:
        config = load_recipe(Path(words[0]), []).config
        if not isinstance(config, RlConfig):
            print("is of another stage")
            return 2
        tasks = Tasks(config)
        print(tasks.describe(), len(tasks.batch(0)))
    except UserError as error:
        print(error)
        return 2
    return 0


Reader = Callable[[list[str]], int]


def environment_rows() -> bytes:
    """Return, for each environment, a line with a request to judge an answer to a task of it."""
    from nemotron.posttrain.environments.base import Response
    from nemotron.posttrain.environments.registry import find_environment
    from nemotron.posttrain.environments.wire import write_response

    lines = []
    for name in ENVIRONMENTS:
        row = next(iter(find_environment(name).rows(1, 1, 0.0)))
        body = {**row, "response": write_response(Response(ANSWER, "Because."))}
        lines.append(json.dumps({"environment": name, "path": "verify", "body": body}))
    return "\n".join(lines).encode() + b"\n"


def _parts(line: bytes) -> tuple[str, str, bytes]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return ENVIRONMENTS[0], "verify", line
    if not isinstance(value, dict) or value.get("environment") not in ENVIRONMENTS:
        return ENVIRONMENTS[0], "verify", line
    return value["environment"], str(value.get("path")), _dumped(value.get("body"))


def _dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000


def _code(status: int, content: bytes) -> int:
    print(status, content[:500])
    if status == 200:
        return 0
    return 2 if status in REFUSED and content else 70


@functools.cache
def _model_server() -> Any:  # Any: a client, whose package only developers have
    from starlette.testclient import TestClient

    from nemotron.commands.serve import _load
    from nemotron.generate.engine import Engine
    from nemotron.serve.access import Access
    from nemotron.serve.app import Server
    from nemotron.serve.grammar import JsonForms
    from nemotron.serve.limits import Limits
    from nemotron.serve.translate import Translator
    from nemotron.serve.worker import Worker

    model, tokenizer, chat = _load(Path("runs/mine"), "cpu")
    engine = Engine(model, {model.config.eos_token_id}, tokenizer=tokenizer, slots=4, prefixes=2)
    limits = Limits(400, answer=8, body_bytes=1 << 20)
    size, ends = model.config.vocab_size, frozenset({model.config.eos_token_id})
    translator = Translator(tokenizer, size, chat, limits, JsonForms(tokenizer, size, ends))
    server = Server("mine", Worker(engine), translator, Access(None, True), "0")
    return TestClient(server.app(), base_url="http://localhost", raise_server_exceptions=False)


@functools.cache
def _environment_server(name: str) -> tuple[str, int]:
    from nemotron.posttrain.environments.registry import find_environment
    from nemotron.posttrain.environments.serve import serve_env

    server = serve_env(find_environment(name))
    _kept.append(server)
    address = urllib.parse.urlsplit(server.url)
    return str(address.hostname), int(address.port or 0)


_kept: list[Any] = []
"""Servers that live as long as this process."""
