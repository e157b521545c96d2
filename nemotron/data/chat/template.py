"""Jinja templates whose `generation` blocks mark what the assistant writes."""

import json
from functools import cache
from importlib import resources
from typing import NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE = resources.files(__package__).joinpath("template.jinja").read_text(encoding="utf-8")
"""Our chat template, as it stands in an export."""

TURN_END = "<|im_end|>"
"""Token at the end of a turn, at which generation stops."""

PAGE = "page being written"  # no name of a template can have spaces


class Page:
    """The text that a template has written so far, and the blocks that were marked in it."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        self.marked: list[tuple[int, str]] = []

    def write(self, piece: str) -> None:
        self.pieces.append(piece)
        self.length += len(piece)

    def mark(self, block: str) -> None:
        """Mark `block`, which will be written next."""
        self.marked.append((self.length, block))


class GenerationTag(Extension):
    """`{% generation %} … {% endgeneration %}`: what stands between is the assistant's.

    The tag of Hugging Face's chat templates. It counts characters while the template is being
    written, so it stands where text goes straight to the page: in loops and conditions, but not
    in a macro, a `set` block or another `generation` block.
    """

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = parser.stream.expect("name:generation").lineno
        marking = self.call_method("mark", [nodes.ContextReference()], lineno=line)
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(marking, [], [], inside, lineno=line)

    def mark(self, context: Context, caller: Macro) -> str:
        block = caller()
        context[PAGE].mark(block)
        return block


def _refuse(sentence: str) -> NoReturn:
    raise TemplateError(sentence)


@cache
def load_template(source: str) -> Template:
    """Compile a template, in an environment like that of Hugging Face's chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, extensions=[GenerationTag]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def fill(template: Template, **values: object) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return the text of a template and the [start, stop) spans of its `generation` blocks."""
    page = Page()
    for piece in template.generate({**values, PAGE: page}):
        page.write(piece)
    text = "".join(page.pieces)
    for start, block in page.marked:
        assert text.startswith(block, start), (
            f"a generation block is not where it was marked, at character {start}: {block!r}"
        )
    return text, tuple((start, start + len(block)) for start, block in page.marked)
