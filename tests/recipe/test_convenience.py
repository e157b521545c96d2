"""What makes a recipe easy to write: other programs' names, removed keys, single items, shares."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from nemotron.errors import UserError
from nemotron.recipe.explain import _section
from nemotron.recipe.load import load_recipe
from nemotron.recipe.stages import STAGES
from nemotron.recipe.synonyms import KEYS, NOTES, hint
from nemotron.train.schedule import build_schedule

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "recipes/tiny/smoke.yaml")


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lr=1e-3", ": lr is unknown; it is `schedule.peak` here."),
        (
            "schedule.learning_rate=1",
            "learning_rate is unknown; it is `schedule.peak` here.",
        ),
        ("optimizer.lr=1", "optimizer.lr is unknown; it is `schedule.peak` here."),
        ("batch_size=8", "it is `batch.global_tokens` here (in tokens: rows times data.seq_len)."),
        ("max-steps=10", "it is `schedule.total_steps` here."),
        ("fp8=true", "it is `precision` here (one word, such as precision: bf16)."),
        ("model.d_model=64", "it is `model.hidden_size` here."),
        ("num_epochs=3", "give the length as `schedule.total_steps` or"),
        ("schedule.peek=1", "the nearest known one is `peak`."),
    ],
)
def test_the_names_of_other_programs_lead_to_ours(change: str, said: str):
    assert said in refusal(SMOKE, change)


def test_every_hint_names_a_key_that_exists():
    for key in [*KEYS, *NOTES]:
        *section, name = key.split(".")
        holders: list[type[BaseModel] | None] = [
            _section(stage.recipe, tuple(section)) for stage in STAGES.values()
        ]
        assert any(name in holder.model_fields for holder in holders if holder is not None), key


def test_no_hint_hides_a_key_of_ours_or_another_hint():
    names = [name for others in KEYS.values() for name in others.split()]
    assert len(names) == len(set(names))
    assert hint("wrong") is None


def test_an_inherited_key_is_removed(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(f"extends: {SMOKE}\nremove: schedule.warmup_steps\n")
    config = load_recipe(path).config
    assert (config.schedule.warmup_steps, config.schedule.decay_steps) == (None, 2)
    path.write_text(f"extends: {SMOKE}\nremove: [evaluation, checkpoint.keep]\n")
    said = f"{path}:2: remove names checkpoint.keep, which no recipe below sets; take it off"
    assert said in refusal(path)
    assert "schedule.peak is missing" in refusal(SMOKE, "remove=schedule.peak")
    assert "remove must be a key such as schedule.decay_steps or a list" in refusal(
        SMOKE, "remove={a: 1}"
    )


def test_a_removed_key_may_be_given_again_above(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text(
        f"extends: {SMOKE}\nremove: [schedule]\nschedule: {{kind: constant, peak: 1}}\n"
    )
    assert "schedule has no length" in refusal(path)
    schedule = load_recipe(path, ["schedule.total_steps=3"]).config.schedule
    assert (schedule.kind, schedule.decay_steps, schedule.total_steps) == ("constant", None, 3)


def test_a_single_item_stands_for_a_list_of_one():
    config = load_recipe(
        SMOKE, ["logging.trackers=wandb", "recompute=mamba", "data.sources={name: verse}"]
    ).config
    assert config.logging.trackers == ("wandb",)
    assert config.recompute == ("mamba",)
    assert [source.name for source in config.data.sources] == ["verse"]
    assert load_recipe(SMOKE, ["recompute=block"]).config.recompute == "block"


def test_a_single_item_is_no_pair_and_no_mistake():
    assert "optimizer.betas = 0.9 must be a list" in refusal(SMOKE, "optimizer.betas=0.9")
    assert "must be one of wandb" in refusal(SMOKE, "logging.trackers=wandbx")
    assert "recompute" in refusal(SMOKE, "recompute=mambo")
    assert "logging.trackers" in refusal(SMOKE, "logging.trackers=null")


SHARES = [
    "remove=[schedule.warmup_steps, schedule.decay_steps]",
    "schedule.warmup_fraction=0.1",
    "schedule.decay_fraction=0.34",
]


@pytest.mark.parametrize(("steps", "warmup", "decay"), [(10, 1, 3), (50, 5, 17), (1000, 100, 340)])
def test_warm_up_and_decay_follow_the_length_of_the_run(steps: int, warmup: int, decay: int):
    config = load_recipe(SMOKE, [*SHARES, f"schedule.total_steps={steps}"]).config
    schedule = build_schedule(config.schedule, 256)
    lengths = (schedule.warmup, schedule.decay, schedule.num_steps)
    assert lengths == (warmup * 256, decay * 256, steps)
    tokens = load_recipe(
        SMOKE, [*SHARES, "remove=schedule.total_steps", f"schedule.total_tokens={steps * 256}"]
    ).config
    assert build_schedule(tokens.schedule, 256) == schedule


def test_a_run_shorter_than_its_warm_up_and_decay_is_refused_with_the_keys_that_follow_it():
    with pytest.raises(UserError) as refused:
        load_recipe(SMOKE, ["schedule.total_steps=3"])
    said = str(refused.value)
    assert "has warm-up 512 + decay 512 tokens, which do not fit into the run's 768" in said
    assert "shorten warmup_steps or decay_steps, or give warmup_fraction and" in said


def test_two_lengths_of_one_thing_are_refused_with_what_helps():
    said = refusal(SMOKE, "schedule.warmup_fraction=0.1")
    assert "schedule has warmup_steps and warmup_fraction; keep one of them (remove=" in said
    assert "schedule.decay_fraction" in refusal(SMOKE, *SHARES, "schedule.decay_fraction=1.1")
    assert "do not fit into" in refusal(SMOKE, *SHARES, "schedule.decay_fraction=0.95")
