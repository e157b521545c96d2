"""Who may use a run's folder, and what is found in it afterwards."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from nemotron.errors import UserError
from nemotron.run.folder import RunFolder, dump_recipe
from nemotron.train.config import PretrainConfig
from nemotron.train.start import dry_run, train
from tests.support import forked

STEPS = 8


def listing(folder: Path) -> dict[str, int]:
    """Return every path under a folder, with the time of its last change."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != "recipe.yaml"}


def pretend_run(recipe, **changes) -> PretrainConfig:
    """Make a folder that looks as a run does after its first line of metrics."""
    config = recipe(**changes)
    with RunFolder(config.run_path, config) as folder:
        folder.write_description(b"{}")
        folder.metrics.write_text('{"kind": "train", "step": 1}\n')
    return config


def test_a_second_run_in_the_same_folder_is_told_who_holds_it(recipe):
    config = recipe()
    with RunFolder(config.run_path, config):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .* since 2"):
            RunFolder(config.run_path, config).check(STEPS, resume=True)
        with (
            pytest.raises(UserError, match="in use by process"),
            RunFolder(config.run_path, config),
        ):
            pass
    RunFolder(config.run_path, config).check(STEPS, resume=True)


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_no_obstacle(recipe, tmp_path):
    config = recipe()
    script = (
        "import json, os, signal, sys\n"
        "from nemotron.train.config import PretrainConfig\n"
        "from nemotron.run.folder import RunFolder\n"
        "config = PretrainConfig.model_validate(json.loads(sys.argv[1]))\n"
        "RunFolder(config.run_path, config).__enter__()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = forked.script(script, json.dumps(config.model_dump()), output=tmp_path / "said.txt")
    assert done.wait() == -signal.SIGKILL, done.text
    lock = Path(config.output) / config.name / "lock"
    assert json.loads(lock.read_text())["pid"] != os.getpid()
    with RunFolder(config.run_path, config):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_an_existing_run_is_never_touched_without_resume(recipe):
    config = pretend_run(recipe)
    before = listing(Path(config.output))
    with pytest.raises(UserError, match=r"contains a run at step 0 of 8; add --resume"):
        train(config)
    assert listing(Path(config.output)) == before


def test_a_resume_with_another_recipe_lists_the_changed_keys(recipe):
    pretend_run(recipe)
    schedule = {"peak": 3e-2, "total_steps": 8, "warmup_steps": 2, "decay_steps": 3}
    changed = recipe(schedule=schedule, seed=7)
    with pytest.raises(UserError) as error:
        train(changed, resume=True)
    assert "seed was 1234, is 7; schedule.peak was 0.01, is 0.03" in str(error.value)
    assert "allow the change with --allow-changed schedule.peak, or" in str(error.value)
    with pytest.raises(UserError, match=r"seed was 1234, is 7, and decides which rows"):
        train(changed, resume=True, allow_changed=["seed", "schedule.peak"])
    changed = recipe(schedule=schedule)
    folder = RunFolder(changed.run_path, changed)
    folder.check(STEPS, resume=True, allow_changed=["schedule.peak"])


def test_a_key_that_came_after_the_version_of_a_run_is_no_change(recipe):
    config = pretend_run(recipe)
    folder = RunFolder(config.run_path, config)
    values = YAML(typ="safe").load(folder.recipe.read_text())
    del values["optimizer"]["muon"], values["loss"]["lid_coeff"], values["data"]["packing"]
    for source in values["data"]["sources"]:
        del source["language"]
    YAML().dump(values, folder.recipe)
    folder.check(STEPS, resume=True)
    other = recipe(optimizer={"muon": {"momentum": 0.9}, "name": "muon"})
    with pytest.raises(UserError, match=r"optimizer\.muon\.momentum was 0\.95, is 0\.9"):
        RunFolder(other.run_path, other).check(STEPS, resume=True)


def test_what_changes_no_result_may_change_on_resume(recipe):
    pretend_run(recipe)
    changed = recipe(
        checkpoint={"every_steps": 5, "keep": 4},
        batch={"global_tokens": 155, "micro_batch": 5},
        logging={"every_steps": 3},
        recompute="block",
    )
    RunFolder(changed.run_path, changed).check(STEPS, resume=True)


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(recipe, tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(UserError, match="cannot be written: Not a directory; set `output`"):
        train(recipe())


def test_a_mistake_after_the_checks_leaves_no_folder(recipe):
    config = recipe(init_from="nowhere")
    with pytest.raises(UserError, match="nowhere: does not exist"):
        train(config)
    assert not (Path(config.output) / config.name).exists()


def test_a_batch_that_is_no_whole_number_of_rows_names_the_nearest(recipe):
    with pytest.raises(
        UserError, match=r"= 100 is not divisible by data.seq_len = 31; the nearest is 93"
    ):
        train(recipe(batch={"global_tokens": 100}))


def test_a_gpu_that_is_not_there_is_answered(recipe, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device = cuda"):
        train(recipe(device="cuda"))


def test_the_resolved_recipe_reads_back_to_the_same_configuration(recipe):
    config = recipe(optimizer={"clip": None, "eps": 1e-9})
    values = YAML(typ="safe", pure=True).load(dump_recipe(config))
    assert PretrainConfig.model_validate(values) == config


def test_a_run_leaves_everything_that_it_takes_to_repeat_it(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {"recipe.yaml", "provenance.json", "metrics.jsonl", "log.txt", "tokenizer.json"} <= names
    tokenizer = json.loads((undisturbed / "tokenizer.json").read_text())
    assert tokenizer["model"]["type"] == "BPE"
    facts = json.loads((undisturbed / "provenance.json").read_text())["starts"][0]
    assert facts["step"] == 0
    assert facts["seed"] == 1234
    assert facts["versions"].keys() >= {"python", "torch"}
    assert facts["backends"]["ssd"]["backend"]
    assert facts["machine"]["threads"] == 1
    assert facts["parameters"] > facts["active"] > 0


def test_no_secret_reaches_the_folder(recipe, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    arguments = ["nemotron", "train", "x.yaml", "password=canary-abc", "https://u:canary-x@h/p"]
    monkeypatch.setattr(sys, "argv", arguments)
    config = recipe("secretive")
    assert train(config, stop_at=1) == 75
    for path in (Path(config.output) / "secretive").rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes(), path


def test_a_dry_run_says_what_would_run_and_writes_nothing(recipe, capsys, tmp_path):
    before = listing(tmp_path)
    assert dry_run(recipe()) == 0
    out = capsys.readouterr().out
    assert "8 steps, 1,240 tokens" in out
    assert "ssd" in out
    assert "(new)" in out
    assert "data       prose: 60.0% of the tokens" in out
    assert listing(tmp_path) == before


def test_a_dry_run_tells_the_formats_and_refuses_a_backend_that_is_not_fit(recipe, capsys):
    low = {"compute": "bf16", "preset": "nvfp4"}
    assert dry_run(recipe(precision=low)) == 0
    assert "precision  nvfp4       mamba.in_proj x 1: default of nvfp4 (emulate)" in (
        capsys.readouterr().out
    )
    later = {"compute": "bf16", "switches": [{"step": 2, "preset": "mxfp8"}], "backend": "torch"}
    with pytest.raises(UserError, match=r"precision.backend = torch is not fit for .* in mxfp8"):
        dry_run(recipe(precision=later))


def test_a_dry_run_refuses_a_backend_that_does_not_exist(recipe):
    with pytest.raises(UserError, match=r"ops.ssd = fast is unknown; use auto or one of .*chunked"):
        dry_run(recipe(ops={"ssd": "fast"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernel can be used")
def test_a_kernel_for_another_device_is_refused_before_and_at_the_start(recipe):
    config = recipe(optimizer={"kernel": "triton"})
    for begin in (dry_run, train):
        with pytest.raises(
            UserError, match=r"optimizer.kernel = triton cannot be used: runs on cuda"
        ):
            begin(config)
    assert not Path(config.run_path).exists()
