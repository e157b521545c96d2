"""`${section.key}` is the value of another key, and nothing else."""

from pathlib import Path

import pytest

from nemotron.errors import UserError
from nemotron.recipe.load import load_recipe
from nemotron.recipe.references import MAX_CHAIN

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes/tiny/smoke.yaml")


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(SMOKE, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_whole_text_takes_the_type_and_a_part_the_text_of_the_other_key():
    config = load_recipe(
        SMOKE,
        ["seed=31", "batch.global_tokens=${data.seq_len}", "batch.micro_batch=1",
         "name=run-${seed}-${schedule.peak}", "output=${name}/${data.seq_len}"],
    ).config  # fmt: skip
    assert config.batch.global_tokens == 64
    assert config.name == "run-31-0.003"
    assert config.output == "run-31-0.003/64"


def test_a_reference_reaches_into_lists():
    changes = [
        "data.sources=[{name: verse, weight: 0.25}]",
        "loss.mtp_loss_factor=${data.sources.0.weight}",
    ]
    assert load_recipe(SMOKE, changes).config.loss.mtp_loss_factor == 0.25


def test_a_dollar_alone_is_text():
    assert load_recipe(SMOKE, ["output=a$b"]).config.output == "a$b"


@pytest.mark.parametrize(
    "text",
    ["${oc.env:HOME}", "${${name}:HOME}", "${oc.decode:1}", "${", "${a b}", "${.name}", "${}"],
)
def test_nothing_but_the_name_of_a_key_is_read(text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "a-secret")
    said = refusal(f"output='{text}'")
    assert said.startswith(f"command line: output = {text} may only name another key")
    assert "a-secret" not in said


def test_resolvers_of_other_programs_are_not_built_from_references():
    # the inner reference would make the text that a second pass reads
    said = refusal("name=oc.env", "output='${${name}:HOME}'")
    assert "may only name another key" in said


def test_an_unknown_key_gets_the_nearest_one():
    said = refusal("schedule.min=${schedule.peek}")
    assert said == (
        "command line: schedule.min = ${schedule.peek} names a key that the recipe does not set; "
        "the nearest is schedule.peak."
    )


def test_a_section_is_no_value():
    assert "names a section or list" in refusal("schedule.min=${schedule}")
    assert "names a section or list" in refusal(
        "schedule.min=${data.sources}", "data.sources=[{name: a}]"
    )


def test_circles_and_endless_texts_are_refused():
    assert "schedule.min -> schedule.min" in refusal("schedule.min=${schedule.min}")
    said = refusal("schedule.min=${schedule.peak}", "schedule.peak=${schedule.min}")
    assert "(schedule.peak -> schedule.min -> schedule.peak); give one of them a value" in said
    doubling = [f"a{i}='${{a{i + 1}}}${{a{i + 1}}}'" for i in range(30)]
    assert "becomes longer than 4096 characters" in refusal(*doubling, "a30=x")
    chain = [f"a{i}=${{a{i + 1}}}" for i in range(MAX_CHAIN + 2)]
    assert "chain of over 32 references" in refusal(*chain, f"a{MAX_CHAIN + 2}=x")


def test_a_mistake_is_placed_in_its_file(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(f"extends: {SMOKE}\nname: a\noutput: '${{env:X}}'\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml:3: output = \$\{env:X\} may only name"):
        load_recipe(tmp_path / "top.yaml")
