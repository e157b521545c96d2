"""What makes a recipe easy to write: other programs' names, removed keys, single items, shares."""

import re
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
        ("decay_ratio=0.1", "it is `schedule.decay_fraction` here."),
        ("fp8=true", "it is `precision` here (one word, such as precision: bf16)."),
        ("model.d_model=64", "it is `model.hidden_size` here."),
        ("num_epochs=3", "give the length as `schedule.total_steps` or"),
        ("parallel.dp=2", "parallel.dp is unknown; it is `parallel.dp_shard` here."),
        ("tensor_parallel_degree=2", "it is `parallel.tp` here."),
        ("data.path=x", "data.path is unknown; it is `data.sources` here."),
        ("sequence_parallel=true", "is unknown; it comes with `parallel.tp`."),
        ("exit_interval=9", "it is `stop.every_steps` here (the option --stop-at stops one start"),
        ("exit-duration-in-mins=230", "it is `stop.after_minutes` here (in minutes, since the "),
        ("stop.exit_duration_in_mins=230", "it is `stop.after_minutes` here (in minutes, since "),
        ("exit_signal_handler=true", "SIGTERM, SIGUSR1 and Ctrl-C always save and stop."),
        ("precision=fp16", "precision = fp16 must be one of fp32, bf16, "),
        ("data.packing=best_fit", "best_fit must be a mapping of keys (kind, long_documents)."),
        ("data=x", "(sources, tiers, validation, missing, tokenizer, eod_token, ...)."),
        ("name=a/b", "name = a/b must consist of letters, digits, '.', '_' and '-', and begin"),
        ("data.sources=[]", "data.sources = [] must have at least 1 item."),
        ("seed=1e3", "seed = 1000.0 must be a whole number; write 1000."),
        ("seed=1.5", "seed = 1.5 must be a whole number."),
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
    path.write_text(f"extends: {SMOKE}\nremove: schedule.warmup_fraction\n")
    config = load_recipe(path).config
    assert (config.schedule.warmup_fraction, config.schedule.decay_fraction) == (None, 0.333)
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
    assert (schedule.kind, schedule.decay_fraction, schedule.total_steps) == ("constant", None, 3)


def test_a_single_item_stands_for_a_list_of_one():
    config = load_recipe(
        SMOKE, ["logging.trackers=wandb", "recompute=mamba", "data.sources={name: verse}"]
    ).config
    assert config.logging.trackers == ("wandb",)
    assert config.recompute == ("mamba",)
    assert [source.name for source in config.data.sources] == ["verse"]
    assert load_recipe(SMOKE, ["recompute=block"]).config.recompute == "block"
    assert load_recipe(SMOKE, ["recompute=selective"]).config.recompute == ("selective",)


def test_a_single_item_is_no_pair_and_no_mistake():
    assert "optimizer.betas = 0.9 must be a list" in refusal(SMOKE, "optimizer.betas=0.9")
    assert "must be one of wandb" in refusal(SMOKE, "logging.trackers=wandbx")
    words = "none, block, mamba, attention, moe, mlp, layernorm, gated_rms_norm, causal_conv1d, "
    words += "moe_act, token_copies or selective"
    expected = f"recompute = mambo must be one of {words}; did you mean mamba?"
    assert refusal(SMOKE, "recompute=mambo").endswith(expected)
    assert refusal(SMOKE, "recompute=[moe, mambo]").endswith(expected)
    assert "logging.trackers" in refusal(SMOKE, "logging.trackers=null")


def lengths(*overrides: str) -> tuple[float, float, float]:
    """Return warm-up, decay and length of the smoke recipe with these overrides, in steps."""
    found = build_schedule(load_recipe(SMOKE, overrides).config.schedule, 256)
    return found.warmup / 256, found.decay / 256, found.total / 256


@pytest.mark.parametrize(
    ("steps", "warmup", "decay"),
    [(1, 0, 0), (2, 1, 1), (3, 1, 1), (4, 1, 1), (6, 2, 2), (50, 17, 17), (1000, 333, 333)],
)
def test_warm_up_and_decay_follow_the_length_of_the_run(steps: int, warmup: int, decay: int):
    expected = (warmup, decay, steps)
    assert lengths(f"schedule.total_steps={steps}") == expected
    assert lengths(f"schedule.total_tokens={steps * 256}") == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule.total_tokens=2048"], (3, 3, 8)),
        (["schedule.warmup_steps=1"], (1, 2, 6)),
        (["schedule.decay_tokens=256", "schedule.warmup_fraction=0.5"], (3, 1, 6)),
        (["schedule={total_tokens: 2048, decay_steps: 1}"], (3, 1, 8)),
        (["schedule.kind=cosine"], (2, 4, 6)),
        (["schedule.kind=constant", "schedule.warmup_tokens=0"], (0, 0, 6)),
        (["schedule.warmup_steps=null"], (2, 2, 6)),
    ],
)
def test_a_length_replaces_an_inherited_one_in_another_unit(overrides: list[str], expected: tuple):
    assert lengths(*overrides) == expected


def test_a_length_of_a_file_replaces_those_of_the_recipes_below(tmp_path: Path):
    (tmp_path / "middle.yaml").write_text(f"extends: {SMOKE}\nschedule: {{total_tokens: 2560}}\n")
    path = tmp_path / "top.yaml"
    path.write_text("extends: middle.yaml\nschedule: {kind: linear}\n")
    recipe = load_recipe(path, ["schedule.total_steps=12"])
    found = recipe.config.schedule
    assert (found.total_tokens, found.total_steps, found.decay_fraction) == (None, 12, None)
    assert ("schedule", "total_tokens") not in recipe.places


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("name", ["tiny/pretrain", "nano/pretrain", "tiny/arith/rl"])
def test_another_kind_takes_what_it_leaves_no_effect(name: str, kind: str):
    recipe = load_recipe(name, [f"schedule.kind={kind}"])
    decays = {path[1] for path in recipe.places if path[0] == "schedule" and path[1:]}
    assert not {"decay", "decay_fraction", "decay_tokens"} & decays
    assert ("min" in decays) == (kind != "constant" and "arith" not in name)
    assert f"schedule.decay has no effect because schedule.kind = {kind}" in refusal(
        name, f"schedule.kind={kind}", "schedule.decay=linear"
    )


@pytest.mark.parametrize("name", ["tiny/smoke", "tiny/arith/rl", "correct/tag", "nano/dpo"])
def test_a_warm_up_longer_than_the_run_is_refused_in_every_stage(name: str):
    said = refusal(name, "schedule.total_steps=100", "schedule.warmup_steps=900")
    assert said.startswith("command line: schedule has warm-up ")
    assert "do not fit into the run's " in said


def test_a_run_shorter_than_its_warm_up_and_decay_is_refused_with_the_keys_that_follow_it():
    steps = ["schedule.warmup_steps=2", "schedule.decay_tokens=512"]
    said = refusal(SMOKE, "schedule.total_steps=3", *steps)
    assert "has warm-up 512 + decay 512 tokens, which do not fit into the run's 768" in said
    assert "shorten warmup_steps or decay_tokens, or give warmup_fraction and " in said
    assert "decay_fraction instead, which follow its length." in said
    said = refusal(SMOKE, "schedule.total_steps=3", steps[0], "schedule.decay_fraction=0.5")
    assert said.endswith(
        "or decay_fraction, or give warmup_fraction instead, which follows its length."
    )


def test_two_lengths_of_one_thing_are_refused_with_what_helps(tmp_path: Path):
    both = ["schedule.total_tokens=512", "schedule.total_steps=3"]
    assert "command line: schedule has total_tokens and total_steps; keep one of them." in refusal(
        SMOKE, *both
    )
    path = tmp_path / "both.yaml"
    path.write_text(f"extends: {SMOKE}\nschedule: {{warmup_steps: 1, warmup_fraction: 0.1}}\n")
    assert f"{path}:2: schedule has warmup_steps and warmup_fraction; keep one" in refusal(path)
    assert "takes no decay length; remove schedule.decay_steps or use kind: wsd" in refusal(
        SMOKE, "schedule.kind=cosine", "schedule.decay_steps=2"
    )
    assert "schedule.decay_fraction" in refusal(SMOKE, "schedule.decay_fraction=1.1")
    said = refusal(SMOKE, "schedule.decay_fraction=0.95")
    assert said.endswith("run's 1,536; shorten warmup_fraction or decay_fraction.")


def test_a_key_of_an_extended_file_that_does_nothing_is_undone_as_the_sentence_says(
    tmp_path: Path,
):
    """Whoever extends a recipe of the package cannot remove its keys."""
    path = tmp_path / "pairs.yaml"
    path.write_text(
        f"extends: {ROOT / 'recipes/tiny/assistant/model.yaml'}\n"
        "stage: dpo\nname: p\ninit_from: runs/base\n"
        "data: {sources: [{name: pairs, path: pairs.jsonl}], seq_len: 64}\n"
        "batch: {global_tokens: 64, micro_batch: 1}\n"
        "schedule: {kind: constant, peak: 1.0e-4, total_steps: 3}\n"
    )
    said = refusal(path)
    assert "loss.mtp_num_depths has no effect because answers are not predicted" in said
    [default] = re.findall(r"remove the key, or write its default, (\S+)\.$", said)
    load_recipe(path, [f"loss.mtp_num_depths={default}"])
