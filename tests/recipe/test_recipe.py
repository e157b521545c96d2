"""Reading, merging, showing and comparing recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.errors import UserError
from nemotron.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "blends")
COMPLETE = [p for p in SHIPPED if p.name != "model.yaml" and p.parent.name != "layouts"]
TINY = str(ROOT / "recipes/tiny/pretrain.yaml")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_are_merged_over_those_they_extend_and_the_command_line_wins(tmp_path: Path):
    (tmp_path / "middle.yaml").write_text(f"extends: {TINY}\nschedule: {{peak: 2e-3}}\nseed: 5\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\nschedule: {warmup_steps: 7}\n")
    config = load_recipe(tmp_path / "top.yaml", ["seed=9", "optimizer.betas=[0.8, 0.9]"]).config
    assert config.schedule.peak == 2e-3
    assert config.schedule.warmup_steps == 7
    assert config.schedule.decay_fraction == 0.333
    assert config.seed == 9
    assert config.optimizer.betas == (0.8, 0.9)


def test_of_several_bases_the_last_named_lies_on_top(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(f"extends: {TINY}\nseed: 1\nname: a\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    (tmp_path / "c.yaml").write_text("extends: [a.yaml, b.yaml]\n")
    config = load_recipe(tmp_path / "c.yaml").config
    assert (config.seed, config.name) == (2, "a")


def test_lists_are_replaced_not_joined(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        f"extends: {TINY}\ndata:\n  sources:\n    - {{name: verse, weight: 1.0}}\n"
    )
    sources = load_recipe(tmp_path / "a.yaml").config.data.sources
    assert [source.name for source in sources] == ["verse"]


def test_a_value_can_name_another(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        f"extends: {TINY}\nschedule: {{min: '${{schedule.peak}}', peak: 0.004}}\n"
    )
    assert load_recipe(tmp_path / "a.yaml").config.schedule.min == 0.004
    assert load_recipe(tmp_path / "a.yaml", ["schedule.peak=0.005"]).config.schedule.min == 0.005


def test_interpolation_runs_nothing_and_reads_no_environment(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(f"extends: {TINY}\nname: '${{oc.env:HOME}}'\n")
    with pytest.raises(UserError, match=r"a\.yaml:2: name = .* may only name another key"):
        load_recipe(tmp_path / "a.yaml")


def test_a_mistake_in_a_base_is_placed_in_the_base(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(f"extends: {TINY}\nschedule:\n  peak: slow\n")
    (tmp_path / "a.yaml").write_text("extends: base.yaml\n")
    with pytest.raises(UserError, match=r"base\.yaml:3: schedule\.peak = slow must be a number"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("path", COMPLETE, ids=name)
def test_what_is_shown_reads_back_as_the_same_recipe(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    assert run(["recipe", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_recipe(tmp_path / "shown.yaml").config == load_recipe(path).config


def test_every_shown_value_comes_with_its_place(capsys: pytest.CaptureFixture):
    assert run(["recipe", "show", TINY, "seed=7"]) == 0
    lines = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "pretrain.yaml:" in lines["peak"]
    assert "model.yaml:" in lines["hidden_size"]
    assert "command line" in lines["seed"]
    assert "default" in lines["eps"]


def test_a_difference_names_the_key_and_both_values(capsys: pytest.CaptureFixture):
    nano = str(ROOT / "recipes/tiny/nano.yaml")
    assert run(["recipe", "diff", TINY, nano]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'name: "tiny" -> "tiny-nano"' in lines
    assert not [line for line in lines if line.startswith("schedule.peak:")]
    assert run(["recipe", "diff", TINY, TINY]) == 0
    assert not capsys.readouterr().out.strip()


def test_the_schema_is_current(capsys: pytest.CaptureFixture):
    assert run(["recipe", "schema"]) == 0
    printed = capsys.readouterr().out
    kept = (ROOT / "recipes/schema.json").read_text()
    assert printed == kept, "run: nemotron recipe schema > recipes/schema.json"
    assert json.loads(kept)["$defs"]["PretrainConfig"]["additionalProperties"] is False


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_every_recipe_names_the_schema_for_editors(path: Path):
    first = path.read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).resolve() == ROOT / "recipes/schema.json"


def test_recipes_are_read_without_torch():
    program = (
        "import sys; from nemotron.cli import run\n"
        f"assert run(['recipe', 'check', {TINY!r}]) == 0\n"
        f"assert run(['recipe', 'show', {TINY!r}]) == 0\n"
        f"assert run(['recipe', 'diff', {TINY!r}, {TINY!r}]) == 0\n"
        "assert run(['recipe', 'schema']) == 0\n"
        "assert run(['--help']) == 0 and run(['train', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'wandb', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
