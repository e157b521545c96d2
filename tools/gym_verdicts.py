"""Compare our verdicts on NeMo Gym's example rows with those of its own servers.

python tools/gym_verdicts.py FOLDER    # an unpacked wheel: pip download --no-deps nemo-gym

For each row several answers are judged, right ones and wrong ones in many forms, by the server's
own `verify` and by our environment; so are the published rollouts, beside their published reward.
The servers' code runs as it is; only the classes around it, which bring HTTP and Ray, are replaced.
Needs the packages that the servers import: fastapi, xmltodict, openapi-schema-validator 0.6.3,
math-verify and reasoning-gym.
"""

import argparse
import asyncio
import importlib
import importlib.machinery
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from nemotron.errors import UserError
from nemotron.posttrain.environments.base import BadRow
from nemotron.posttrain.environments.registry import find_environment
from nemotron.posttrain.environments.wire import read_response

Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A resources server of NeMo Gym, and our environment for its rows."""

    name: str
    environment: str
    server: str | None = None
    """Class of the server; None where only the published rewards are compared."""
    request: str = ""
    config: str = "{}"
    files: tuple[str, ...] = ("example",)
    needs: str = "responses_create_params"
    """What its verifier reads; some published rollouts lack it."""


SERVERS = (
    Server("mcqa", "mcqa", "MCQAResourcesServer", "MCQAVerifyRequest"),
    Server("gpqa_diamond", "mcqa"),
    Server(
        "structured_outputs",
        "json_schema",
        "StructuredOutputsResourcesServer",
        "StructuredOutputsVerifyRequest",
        files=("example", "structured_outputs_v3_example", "structured_outputs_v4_example"),
        needs="schema_str",
    ),
    Server(
        "single_step_tool_use_with_argument_comparison",
        "pivot",
        "SingleStepToolUseArgumentComparisonResourcesServer",
        "SingleStepToolUseArgumentComparisonVerifyRequest",
        '{"tool_call_comparator_config": {"word_count_similarity_threshold": 0.1}}',
    ),
    Server(
        "reasoning_gym",
        "reasoning_gym",
        "ReasoningGymResourcesServer",
        "ReasoningGymVerifyRequest",
    ),
    Server("math_with_judge", "math_symbolic"),
    Server("instruction_following", "if_constraints"),
    Server("code_gen", "code_exec"),
)


def main() -> None:
    """Print for each server how many verdicts agree, and those that do not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", action="store_true", help="print verdicts that differ")
    given = parser.parse_args()
    sys.path.insert(0, str(given.folder))
    sys.meta_path.insert(0, StandIns())
    for server in SERVERS:
        for name, pairs in (
            ("its own server", answers(given.folder, server)),
            ("published", published(given.folder, server)),
        ):
            counts = dict.fromkeys(("agree", "differ", "refused"), 0)
            for row, response, theirs in pairs:
                own = ours(server, row, response)
                kind = "refused" if isinstance(own, str) else "agree" if own == theirs else "differ"
                counts[kind] += 1
                if given.show and own != theirs:
                    said = json.dumps(response["output"])[-160:]
                    print(f"  {server.name}: {theirs} there, {own} here: {said}")
            if any(counts.values()):
                said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
                print(f"{server.name:<46} {name:<15} {said}")


def ours(server: Server, row: Json, response: Json) -> float | str:
    """Return our reward, or why there is none."""
    try:
        environment: Any = find_environment(server.environment)
        environment.check(row)
        verdict = environment.verify(row, read_response(response), environment.seed(row))
    except (BadRow, UserError) as problem:
        return f"refused: {problem}"
    return verdict.error or float(verdict.reward)


def rows_of(folder: Path, server: Server, file: str) -> list[Json]:
    """Return the rows of a file of a server; none if it is absent."""
    path = folder / "resources_servers" / server.name / "data" / f"{file}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def published(folder: Path, server: Server) -> Iterator[tuple[Json, Json, float]]:
    """Yield published rollouts: row, response and reward of the verifier without a judge."""
    known: dict[str, Json] = {}
    for file in server.files:
        known |= {prompt_of(row): row for row in rows_of(folder, server, file)}
    for found in rows_of(folder, server, "example_rollouts"):
        row = known.get(prompt_of(found), {}) | found
        key = "library_reward" if "library_reward" in found else "reward"
        yield row, found["response"], float(found[key])


def prompt_of(row: Json) -> str:
    """Return the prompt as one text, however its messages are written."""
    given = row["responses_create_params"]["input"]
    if isinstance(given, str):
        return given
    return "\n".join(str(item.get("content")) for item in given)


def answers(folder: Path, server: Server) -> Iterator[tuple[Json, Json, float]]:
    """Yield published answers and made ones, with the reward of the server's own code."""
    if server.server is None:
        return
    module: Any = importlib.import_module(f"resources_servers.{server.name}.app")
    made, request = getattr(module, server.server), getattr(module, server.request)
    judge = made()
    judge.config = made.__annotations__["config"](**json.loads(server.config))

    def reward(row: Json, output: list[Json]) -> float:
        known = {name: row[name] for name in request.model_fields if name in row}
        given = request(**known | {"response": Response(output)})
        return float(asyncio.run(judge.verify(given)).reward)

    for row, response, _ in published(folder, server):
        if server.needs in row:
            yield row, response, reward(row, response["output"])
    for file in server.files:
        for row in rows_of(folder, server, file):
            if row.get("schema_type", "json") not in ("json", "yaml"):
                continue
            for output in globals()[f"answers_{server.environment}"](row):
                yield row, {"output": output}, reward(row, output)


def message(text: str) -> list[Json]:
    """Return the output of a response that is a text."""
    parts = [{"type": "output_text", "text": text, "annotations": []}]
    return [{"type": "message", "role": "assistant", "content": parts}]


def call(name: str, arguments: Any) -> Json:
    """Return a call; `arguments` is a text, or written as JSON."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"type": "function_call", "name": name, "arguments": text, "call_id": "c"}


def answers_mcqa(row: Json) -> Iterator[list[Json]]:
    """Yield every letter in many forms."""
    forms = (
        *("\\boxed{%s}", "\\boxed{\\text{%s}}", "\\boxed{(%s)}", "\\boxed{%s: %s}", "%s"),
        *("\\boxed{%s) %s}", "Answer: %s", "so \\boxed{A}, no: \\boxed{%s}", "\\boxed{%s or A}"),
        *("\\boxed{%s", "**%s**", "\\boxed{the answer is %s}", "\\boxed{%s, A}", "\\boxed{[%s]}"),
    )
    options = {letter: text for entry in row["options"] for letter, text in entry.items()}
    for letter, text in options.items():
        for form in forms:
            yield message(form % ((letter, text)[: form.count("%s")]))
        yield message(f"\\boxed{{{text}}}")
        yield message(f"\\boxed{{{letter.lower()}}}")
    yield message("")
    yield message("\\boxed{}")
    yield message("\\boxed{Z}")


def answers_json_schema(row: Json) -> Iterator[list[Json]]:
    """Yield a document that fits and others that do not, as text and as calls."""
    right = instance(json.loads(row["schema_str"]))
    documents = [right, [right], {}, None]
    if isinstance(right, dict):
        documents += [right | {"further": 1}]
        documents += [{k: v for k, v in right.items() if k != name} for name in right]
        documents += [right | {name: {"of": "another type"}} for name in right]
    for document in documents:
        text = json.dumps(document)
        yield message(text)
        yield message(f"```json\n{text}\n```")
        yield message(f"Here: {text}")
        if tool := row.get("tool_name"):
            key = row.get("tool_payload_key")
            given = document if key is None else {key: document}
            yield [call(tool, given)]
            yield [*message("I call it."), call(tool, given)]
            yield [call("another", given)]
            yield [call(tool, given)] * 2
            yield [call(tool, {"other": given})]
            yield [call(tool, text[:-1])]


def instance(schema: Json) -> Any:
    """Return a value that fits a strict schema."""
    if "$ref" in schema or "anyOf" in schema or "oneOf" in schema or "allOf" in schema:
        return instance((schema.get("anyOf") or schema.get("oneOf") or schema["allOf"])[0])
    if "enum" in schema:
        return schema["enum"][0]
    if "const" in schema:
        return schema["const"]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {name: instance(inner) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {}))] * max(1, schema.get("minItems", 1))
    if kind in ("integer", "number"):
        return schema.get("minimum", 1)
    if kind == "boolean":
        return True
    return {"date": "2026-01-31", "date-time": "2026-01-31T08:00:00Z"}.get(
        schema.get("format", ""), "some text"
    )


def answers_pivot(row: Json) -> Iterator[list[Json]]:
    """Yield the expected action, others like it, and others."""
    expected = row["expected_action"]
    yield message("May I ask for your number?")
    if expected["type"] == "message":
        yield message(expected["content"])
        for tool in row["responses_create_params"]["tools"][:2]:
            yield [call(tool["name"], {})]
        return
    name, text = expected["name"], expected["arguments"]
    arguments = json.loads(text)
    yield [call(name, text)]
    yield [*message("I look it up."), call(name, dict(reversed(arguments.items())))]
    yield [call(name, json.dumps(arguments, indent=2))]
    yield [call("another", text)]
    yield [call(name, text[:-1])]
    yield [call(name, arguments | {"unknown": 1})]
    for key in arguments:
        yield [call(name, {k: v for k, v in arguments.items() if k != key})]
        yield [call(name, arguments | {key: ["another"]})]
        yield [call(name, arguments | {key: "X-another-1"})]


def answers_reasoning_gym(row: Json) -> Iterator[list[Json]]:
    """Yield the right answer and wrong ones, tagged, boxed and bare."""
    for text in (row["answer"], "no", row["answer"][::-1], ""):
        yield message(f"I think so.\n<answer>{text}</answer>")
        yield message(f"\\boxed{{{text}}}")
        yield message(f"<answer>no</answer> <answer>{text}</answer>")


class Response:
    """What a server reads of a response."""

    def __init__(self, output: list[Json]) -> None:
        self.output = [json.loads(json.dumps(item), object_hook=_Item) for item in output]
        self.error = None

    @property
    def output_text(self) -> str:
        """All texts, as in OpenAI's package."""
        messages = [item for item in self.output if item.type == "message"]
        return "".join(part.text for item in messages for part in item.content)


class _Item(types.SimpleNamespace):
    def __init__(self, values: Json) -> None:
        super().__init__(**values)


class _Base(BaseModel):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class StandIns:
    """Makes modules of `nemo_gym` whose names are models that take anything."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        """Return how such a module is made; None for all others."""
        if name != "nemo_gym" and not name.startswith("nemo_gym."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        """Return the module."""
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._find  # type: ignore[method-assign]
        return module

    def _find(self, name: str) -> Any:
        if name == "ReverifyMode":
            return types.SimpleNamespace(STATELESS="stateless")
        return type(name, (), {}) if name == "SimpleResourcesServer" else _Base

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing: all names are there."""


if __name__ == "__main__":
    main()
