"""Chat templates of other models: limited in time and memory, and kept from Python's objects."""

import sys
from pathlib import Path

import pytest
from jinja2 import TemplateError

from nemotron.data.chat import render_worker
from nemotron.data.chat.foreign import ForeignTemplate
from nemotron.data.chat.render import render
from nemotron.data.chat.template import TEMPLATE
from tests.support.conversations import GARDEN, GARDEN_TOOLS, QUESTION

LOOP = "{% for i in range(99999) %}" * 4 + "{% set x = 1 %}" + "{% endfor %}" * 4


def test_a_template_in_a_process_of_its_own_writes_the_same_text():
    own = render(GARDEN, GARDEN_TOOLS, add_generation_prompt=True)
    foreign = ForeignTemplate(TEMPLATE)
    for _ in range(2):
        found = render(GARDEN, GARDEN_TOOLS, add_generation_prompt=True, template=foreign)
        assert found.text == own.text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ 'a' * 10**10 }}", "more than 1 GiB"),
        ("{{ '%10000000000d' | format(1) }}", "more than 1 GiB"),
        ("{{ messages[0].content * 20000000 }}", "writes 20000004 letters"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "maximum recursion depth"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ lipsum.__globals__ }}", "is unsafe"),
        ("{{ raise_exception('no way') }}", "no way"),
    ],
    ids=range(8),
)
def test_a_template_that_takes_too_much_is_refused_and_the_next_text_is_its_own(
    source: str, said: str
):
    template = ForeignTemplate("{% if messages|length > 1 %}" + source + "{% endif %}fine")
    with pytest.raises(TemplateError, match=said):
        render([QUESTION, QUESTION], template=template)
    assert render([QUESTION], template=template).text == "fine"


def test_a_template_that_is_nested_too_deep_is_refused():
    template = ForeignTemplate("{% if true %}" * 2000 + "{% endif %}" * 2000)
    with pytest.raises(TemplateError, match="maximum recursion depth"):
        render([QUESTION], template=template)


def test_a_template_that_never_ends_is_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = Path(render_worker.__file__).read_text().replace("LIMIT_S = 5.0", "LIMIT_S = 0.3")
    (tmp_path / "hasty_worker.py").write_text(program)
    monkeypatch.setattr(
        "nemotron.data.chat.foreign.module_command",
        lambda _: [sys.executable, str(tmp_path / "hasty_worker.py")],
    )
    template = ForeignTemplate("{% if messages|length > 1 %}" + LOOP + "{% endif %}fine")
    with pytest.raises(TemplateError, match="it takes too long"):
        render([QUESTION, QUESTION], template=template)
    assert render([QUESTION], template=template).text == "fine"
