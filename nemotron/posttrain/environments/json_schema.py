"""`json_schema`: answers that fit a schema, as JSON, YAML or arguments of a tool."""

import json
from collections.abc import Iterator
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.environments import schema_tasks
from nemotron.posttrain.environments.base import (
    BadRow,
    Response,
    Row,
    Verdict,
    build_row,
    calls_of,
    find_field,
    optional_field,
    random_of,
    whole_level,
)
from nemotron.posttrain.environments.documents import BadDocument, read_document

TYPES = ("json", "yaml")
MODES = ("text", "tool")
RESPONSE_MODES = ("text", "tool_call")
TOOL = "submit"


class JsonSchema:
    """Write a text's facts as a document that fits a JSON Schema; values are not judged.

    The schema is made strict, as OpenAI's structured outputs are: each object has all of its
    properties and no others. In mode `text` the whole answer is the document; in mode `tool` the
    arguments of the only call are. With `response_mode: tool_call`, as in NVIDIA-NeMo/Gym, the only
    call is one of `tool_name`, and the document may lie under `tool_payload_key`. Level 0 has two
    flat properties, further levels more and nested ones.

    Raises:
        UserError: when the package `jsonschema` is not installed.
    """

    name = "json_schema"
    max_level = 8
    """Has as many properties as a task may have."""

    def __init__(self) -> None:
        try:
            import jsonschema
        except ImportError:
            raise UserError(
                "needs the package jsonschema; install it with: pip install 'jsonschema>=4.26'",
                key="environments",
                value="json_schema",
            ) from None
        self._jsonschema = jsonschema

    def rows(self, count: int, seed: int, level: float) -> Iterator[Row]:
        """Yield tasks; each depends on `seed`, `level` and its number alone."""
        for number in range(count):
            rng = random_of(self.name, seed, level, number)
            task = schema_tasks.generate(rng, whole_level(rng, level))
            kind, mode = rng.choice(TYPES), "text"
            if rng.random() < 0.25:
                kind, mode = "json", "tool"
            fields = {"schema_str": json.dumps(task.schema), "schema_type": kind, "mode": mode}
            row = build_row(self.name, _prompt(task, kind, mode), **fields)
            row["responses_create_params"]["tools"] = self.tools(row)
            yield row

    def tools(self, row: Row) -> list[dict[str, Any]]:
        """Return the one tool of mode `tool`."""
        if optional_field(row, "mode", "text") == "text":
            return []
        schema = strict(json.loads(schema_of(row)))
        return [
            {
                "type": "function",
                "name": TOOL,
                "description": "Submit the answer.",
                "parameters": schema,
                "strict": True,
            }
        ]

    def check(self, row: Row) -> None:
        """Check the schema and the kind of answer.

        Raises:
            BadRow: when the schema is not a valid one, or refers to another document.
        """
        kinds = (("schema_type", TYPES), ("mode", MODES), ("response_mode", RESPONSE_MODES))
        for name, known in kinds:
            value = optional_field(row, name, known[0])
            if value not in known:
                raise BadRow(f"{name} = {value!r} is unknown; give one of {', '.join(known)}")
        text = schema_of(row)
        try:
            schema = json.loads(text)
            self._jsonschema.Draft202012Validator.check_schema(schema)
        except (TypeError, ValueError, self._jsonschema.SchemaError) as error:
            reason = str(error).splitlines()[0]
            raise BadRow(f"schema_str is not a JSON Schema: {reason}; mend it") from None
        if not isinstance(schema, dict) or any(not ref.startswith("#") for ref in _refs(schema)):
            raise BadRow("schema_str refers to another document; give one that is complete")

    def seed(self, row: Row) -> None:
        """Return nothing: the tool changes nothing."""

    def call(self, state: None, name: str, arguments: dict[str, Any]) -> str:
        """Say that the answer was taken."""
        return "submitted" if name == TOOL else f"error: there is no tool {name}"

    def verify(self, row: Row, response: Response, state: Any) -> Verdict:
        """Reward 1 if the document is well-formed and fits the strict schema, else 0."""
        if optional_field(row, "response_mode", "text") == "tool_call":
            return self._verify_call(row, response)
        text, kind = response.text, optional_field(row, "schema_type", "json")
        if optional_field(row, "mode", "text") == "tool":
            made = calls_of(response)
            if len(made) != 1 or made[0].name != TOOL:
                return Verdict(0.0)
            text, kind = made[0].arguments, "json"
        try:
            document = read_document(text, kind)
        except BadDocument:
            return Verdict(0.0)
        return Verdict(float(self._fits(document, row)), extracted=text)

    def _verify_call(self, row: Row, response: Response) -> Verdict:
        """Judge the one call of a row of NVIDIA-NeMo/Gym, or what its `tool_payload_key` holds."""
        made, name = calls_of(response), optional_field(row, "tool_name", None)
        if len(made) != 1 or (name and made[0].name != name):
            return Verdict(0.0)
        try:
            document = read_document(made[0].arguments, "json")
        except BadDocument:
            return Verdict(0.0)
        if key := optional_field(row, "tool_payload_key", None):
            if not isinstance(document, dict) or key not in document:
                return Verdict(0.0)
            document = document[key]
        return Verdict(float(self._fits(document, row)), extracted=made[0].arguments)

    def _fits(self, document: Any, row: Row) -> bool:
        import referencing

        validator = self._jsonschema.Draft202012Validator(
            strict(json.loads(schema_of(row))),
            registry=referencing.Registry(),  # looks nothing up in the network
            format_checker=self._jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )
        return bool(validator.is_valid(document))


def schema_of(row: Row) -> Any:
    """Return the text of the schema; NVIDIA-NeMo/Gym's older rows call it `schema`.

    Raises:
        BadRow: when there is none.
    """
    older = optional_field(row, "schema", None)
    return find_field(row, "schema_str") if older is None else older


def strict(schema: Any) -> Any:  # Any: a schema is an object or a boolean
    """Return the schema with all properties required and no others allowed, at every depth."""
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for key in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"):
        if isinstance(schema.get(key), dict):
            found[key] = {name: strict(inner) for name, inner in schema[key].items()}
    for key in ("items", "additionalProperties", "contains", "if", "then", "else"):
        if isinstance(schema.get(key), dict):
            found[key] = strict(schema[key])
    for key in ("anyOf", "allOf", "oneOf", "prefixItems"):
        if isinstance(schema.get(key), list):
            found[key] = [strict(inner) for inner in schema[key]]
    if isinstance(schema.get("properties"), dict):
        found["required"] = sorted({*schema["properties"], *schema.get("required", [])})
        found["additionalProperties"] = False
    return found


def _refs(schema: Any) -> Iterator[str]:
    """Yield every reference in a schema."""
    if isinstance(schema, dict):
        for key, inner in schema.items():
            if key in ("$ref", "$dynamicRef", "$schema") and isinstance(inner, str):
                known = key == "$schema" and "json-schema.org" in inner
                yield "#" if known else inner
            yield from _refs(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from _refs(inner)


def _prompt(task: schema_tasks.SchemaTask, kind: str, mode: str) -> str:
    how = f"Call the tool `{TOOL}` once." if mode == "tool" else f"Answer with {kind.upper()} alone"
    end = "" if mode == "tool" else ", without a code fence."
    schema = json.dumps(strict(task.schema), indent=1)
    return f"{task.text}\n\nWrite this as a document that fits the schema:\n{schema}\n{how}{end}"
