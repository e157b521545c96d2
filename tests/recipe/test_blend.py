"""Blends: groups and tiers, Megatron's lists, blend files in recipes."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from nemotron.data.config import BlendConfig, leaves
from nemotron.errors import UserError
from nemotron.recipe.blend import is_megatron_blend, read_megatron_blend
from nemotron.recipe.load import load_recipe

SMOKE = Path(__file__).parents[2] / "recipes/tiny/smoke.yaml"


def weights(blend: BlendConfig) -> dict[str, float]:
    whole = sum(leaf.weight for leaf in leaves(blend))
    return {leaf.source.name: leaf.weight / whole for leaf in leaves(blend)}


def test_a_group_shares_its_weight_by_its_members_weights_and_tiers():
    blend = BlendConfig.model_validate(
        {
            "tiers": {"high": 3.0, "medium": 1.0},
            "sources": [
                {
                    "name": "crawl",
                    "weight": 6,
                    "sources": [
                        {"name": "good", "weight": 1, "tier": "high", "path": "p1"},
                        {"name": "fair", "weight": 1, "tier": "medium", "path": "p2"},
                    ],
                },
                {"name": "code", "weight": 2},
                {"name": "math", "weight": 1, "path": "p3", "tier": "medium"},
                {"name": "wiki", "weight": 1, "path": "p4"},
            ],
        }
    )
    expected = {"good": 0.45, "fair": 0.15, "code": 0.2, "math": 0.1, "wiki": 0.1}
    assert weights(blend) == pytest.approx(expected)
    assert [leaf.group for leaf in leaves(blend)] == ["crawl", "crawl", None, None, None]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"name": "x", "path": "p", "tier": "gold"}, "tier 'gold' for 'x', which is not a key"),
        ({"name": "g", "path": "p", "sources": [{"name": "code"}]}, "has a path and members"),
        ({"name": "g", "sources": [{"name": "web"}]}, "'web' has no path and is not an embedded"),
        ({"name": "g", "sources": [{"name": "code"}, {"name": "code"}]}, "names 'code' twice"),
        ({"name": "g", "sources": [{"name": "code", "weight": 0}]}, "greater than 0"),
    ],
)
def test_blends_that_cannot_be_meant_are_refused(source: dict[str, object], sentence: str):
    with pytest.raises(ValidationError, match=sentence):
        BlendConfig.model_validate({"sources": [source]})


def test_megatrons_forms_are_understood():
    flat = read_megatron_blend([0.3, "x/a_text", "0.7", "x/b_text"], "b.json")
    assert flat["sources"] == [
        {"name": "a_text", "weight": 0.3, "path": "x/a_text"},
        {"name": "b_text", "weight": 0.7, "path": "x/b_text"},
    ]
    split = {"train": ["1.0", "one/p", "2.0", "two/p"], "valid": ["1", "three/v"], "test": []}
    found = read_megatron_blend(split, "b.json")
    assert [source["name"] for source in found["sources"]] == ["p", "two/p"]
    assert found["validation"] == [{"name": "v", "path": "three/v"}]
    alone = read_megatron_blend(["p1", "p2"], "b.json")
    assert [source["weight"] for source in alone["sources"]] == [1.0, 1.0]
    assert is_megatron_blend(split)
    assert is_megatron_blend(["p1"])
    assert not is_megatron_blend({"sources": [{"name": "a"}]})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([0.3, "a", 0.7], "has 3 entries; write weight and prefix in turn"),
        ([0.3, "a", -1, "b"], "entries 2 and 3: -1, 'b' must be a weight above 0"),
        ([0.3, 4], "must be a weight above 0"),
        ({"train": [1, "a"], "dev": []}, "dev is not a split"),
        ({"train": []}, "train is empty"),
    ],
)
def test_lists_that_are_none_are_refused(content: object, sentence: str):
    with pytest.raises(UserError, match=sentence):
        read_megatron_blend(content, "b.json")


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipes" / "mine.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"extends: {SMOKE}\nname: mine\n{text}")
    return path


def test_a_blend_file_is_found_beside_the_recipe_and_becomes_part_of_it(tmp_path: Path):
    recipe = write_recipe(tmp_path, "data:\n  blend: blends/one.yaml\n")
    (tmp_path / "recipes" / "blends").mkdir()
    (tmp_path / "recipes" / "blends" / "one.yaml").write_text(
        "sources:\n  - {name: verse, weight: 2}\n  - {name: web, path: data/web}\n"
        "missing:\n  - {name: code, weight: 14}\n"
    )
    data = load_recipe(recipe).config.data
    assert [(source.name, source.weight) for source in data.sources] == [("verse", 2), ("web", 1)]
    assert data.missing[0].name == "code"
    (tmp_path / "list.json").write_text(json.dumps([1.0, "x", 3.0, "y"]))
    data = load_recipe(recipe, [f"data.blend={tmp_path / 'list.json'}"]).config.data
    assert [source.path for source in data.sources] == ["x", "y"]


def test_phases_and_lengths_name_blend_files_of_their_own(tmp_path: Path):
    recipe = write_recipe(
        tmp_path,
        "phases:\n"
        "  - {name: one, steps: 2}\n"
        "  - name: two\n"
        "    blend: two.yaml\n"
        "    lengths:\n"
        "      - {seq_len: 64, share: 3}\n"
        "      - {seq_len: 32, share: 1, blend: three.yaml}\n",
    )
    (tmp_path / "recipes" / "two.yaml").write_text("sources: [{name: docs}]\n")
    (tmp_path / "recipes" / "three.yaml").write_text("sources: [{name: verse}]\n")
    one, two = load_recipe(recipe).config.phases
    assert one.blend is None
    assert two.blend.sources[0].name == "docs"
    assert two.lengths[1].blend.sources[0].name == "verse"


def test_a_mistake_in_a_blend_file_is_told_with_its_line(tmp_path: Path):
    recipe = write_recipe(tmp_path, "data:\n  blend: one.yaml\n")
    blend = tmp_path / "recipes" / "one.yaml"
    blend.write_text("sources:\n  - name: verse\n    weight: -3\n")
    with pytest.raises(UserError, match=r"one\.yaml:3: data\.sources\.0\.weight = -3 must"):
        load_recipe(recipe)
    blend.write_text("sources:\n  - name: verse\nfrom: here\n")
    with pytest.raises(UserError, match=r"one\.yaml:3: from is unknown in a blend"):
        load_recipe(recipe)
    write_recipe(tmp_path, "data:\n  blend: one.yaml\n  sources: [{name: code}]\n")
    with pytest.raises(UserError, match=r"data\.blend = one\.yaml is given together with sources"):
        load_recipe(recipe)
