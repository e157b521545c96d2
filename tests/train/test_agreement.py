"""Ranks that were started with different recipes, data or weights: none of them trains."""

import pytest

from nemotron.train.start import train
from tests.support.job import Job
from tests.support.prepared import write_prepared

pytestmark = [pytest.mark.distributed, pytest.mark.waits(25)]


def said_by_all(job: Job) -> str:
    """Return the sentence of a job whose ranks all end with it."""
    assert job.wait() == [2, 2], job.text()
    words = [" ".join(process.text.split()) for process in job.processes]
    sentence = words[0].rpartition("nemotron: ")[2]
    assert words[1].rpartition("nemotron, rank 1: ")[2] == sentence
    return sentence


def test_every_setting_that_differs_is_named_with_its_ranks(on_two):
    other = ("seed=7", "schedule.peak=2e-3", "optimizer.weight_decay=0.3", "optimizer.clip=0.5")
    job = Job(on_two("differs"), of_rank={1: (*other, "data.cache=elsewhere")})
    sentence = said_by_all(job)
    assert "schedule.peak = 0.001 on rank 0 but 0.002 on rank 1" in sentence
    assert "optimizer.weight_decay = 0.1 on rank 0 but 0.3 on rank 1" in sentence
    assert "seed = 1234 on rank 0 but 7 on rank 1" in sentence
    assert "optimizer.clip = 1.0 on rank 0 but 0.5 on rank 1" in sentence
    assert "data.cache" not in sentence
    assert not job.run.exists()


@pytest.mark.nightly
def test_a_rank_that_alone_resumes_is_named(on_two):
    sentence = said_by_all(Job(on_two("resumes"), of_rank={1: ("--resume",)}))
    assert "--resume = false on rank 0 but true on rank 1" in sentence


def test_data_of_another_content_under_the_same_name_is_refused(on_two, tmp_path):
    for name, texts in (("here", ["the river runs"] * 90), ("there", ["the river ends"] * 90)):
        write_prepared(texts, tmp_path / name / "text")
    sources = [{"name": "text", "weight": 1.0, "path": "text"}]
    config = on_two("data", data={"sources": sources, "seq_len": 31})
    job = Job(config, folders=[tmp_path / "here", tmp_path / "there"])
    assert "the data's sources.text.content = " in said_by_all(job)


@pytest.mark.nightly
def test_other_initial_weights_under_the_same_name_are_refused(on_two, recipe, tmp_path):
    for folder, seed in (("here", 1), ("there", 2)):
        run = recipe("first", seed=seed, output=str(tmp_path / folder))
        assert train(run, stop_at=1) == 75
    job = Job(on_two("weights", init_from="first"), folders=[tmp_path / "here", tmp_path / "there"])
    assert "init_from: backbone.embeddings.weight = " in said_by_all(job)


@pytest.mark.nightly
def test_another_checkpoint_under_the_same_name_is_refused(on_two, tmp_path):
    folders = [tmp_path / name for name in ("here", "there")]
    for folder, seed in zip(folders, (1234, 2), strict=True):
        assert train(on_two("copies", seed=seed, output=str(folder / "runs")), stop_at=1) == 75
    job = Job(on_two("copies", output="runs"), "--resume", folders=folders)
    assert "is another checkpoint on rank 1 than on rank 0" in said_by_all(job)
