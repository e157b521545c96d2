"""Phases, alternating lengths and what a resumed run may change: no row twice, none lost."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from nemotron.cli import run
from nemotron.data.config import DataConfig, Leaf, SourceConfig
from nemotron.data.loader import TrainingData
from nemotron.data.mixture import Phase, RowLength, Timeline
from nemotron.errors import UserError
from tests.support.prepared import write_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for first, name in ((100, "a"), (1000, "b"), (2000, "c")):
        documents = ([first + i] * (3 + i % 5) for i in range(60))
        write_ids(documents, folder / name, validation_fraction=0.0)
    return folder


def mix(folder: Path, **weights: float) -> tuple[Leaf, ...]:
    return tuple(
        Leaf(source=SourceConfig(name=n, path=str(folder / n)), weight=w, group=None)
        for n, w in weights.items()
    )


def phase(name: str, steps: int, tokens: int, *lengths: RowLength) -> Phase:
    return Phase(name, steps, tokens, lengths)


def make_data(folder: Path, *phases: Phase) -> TrainingData:
    config = DataConfig(cache=str(folder / "cache"), seq_len=8)
    return TrainingData(config, Timeline(phases), seed=5, vocab_size=4096)


def test_the_blend_changes_exactly_between_two_steps(folder: Path):
    one = phase("one", 7, 32, RowLength(8, 1.0, mix(folder, a=1)))
    two = phase("two", 5, 64, RowLength(8, 1.0, mix(folder, b=1, c=1)))
    data = make_data(folder, one, two)
    timeline = data.timeline
    assert (timeline.num_steps, timeline.num_tokens) == (12, 7 * 32 + 5 * 64)
    assert [timeline.tokens_before(step) for step in (0, 6, 7, 8, 12)] == [0, 192, 224, 288, 544]
    sources = [{s.source for s in data.sample_ids(step)} for step in range(12)]
    assert sources == [{"a"}] * 7 + [{"b", "c"}] * 5
    assert [len(data.sample_ids(step)) for step in range(12)] == [4] * 7 + [8] * 5
    assert data.tokens_read(7) == {"a": 224, "b": 0, "c": 0}
    assert data.tokens_read(12) == {"a": 224, "b": 160, "c": 160}


def test_a_source_goes_on_where_the_phase_before_left_it(folder: Path):
    shares = [{"a": 3, "b": 1}, {"a": 1, "b": 1, "c": 2}, {"a": 1, "c": 1}]
    phases = [
        phase(str(i), 5 + i, 32 * (1 + i), RowLength(8, 1.0, mix(folder, **weights)))
        for i, weights in enumerate(shares)
    ]
    data = make_data(folder, *phases)
    ids = [s for step in range(data.timeline.num_steps) for s in data.sample_ids(step)]
    assert len(set(ids)) == len(ids)
    for name in "abc":
        own = [(s.epoch, s.sample) for s in ids if s.source == name]
        rows = data.mixtures.sources[name, 8]
        assert own == [rows.place(number) for number in range(len(own))]


def test_rows_of_another_length_are_a_pass_of_their_own_and_the_log_says_so(folder: Path):
    one = phase("one", 4, 32, RowLength(8, 1.0, mix(folder, a=1, b=1)))
    two = phase("two", 4, 32, RowLength(16, 1.0, mix(folder, b=1, c=1)))
    data = make_data(folder, one, two)
    assert [data.seq_len(step) for step in (3, 4)] == [8, 16]
    assert data.batch(4).input_ids.shape == (2, 16)
    logged = [line for line in data.describe() if "separate pass" in line]
    assert logged == [
        "phase two: b starts a separate pass in rows of 16, in addition to the pass in rows of 8"
    ]
    read, rows = (
        data.mixtures.rows_read(8),
        {key: source.num_rows for key, source in data.mixtures.sources.items()},
    )
    assert data.epochs(8)["b"] == pytest.approx(
        read["b", 8] / rows["b", 8] + read["b", 16] / rows["b", 16]
    )


def test_lengths_alternate_by_their_shares_with_equal_tokens_a_step(folder: Path):
    long, short = RowLength(32, 0.92, mix(folder, a=1)), RowLength(4, 0.08, mix(folder, b=1))
    data = make_data(folder, phase("long", 100, 64, long, short))
    lengths = [data.seq_len(step) for step in range(100)]
    assert Counter(lengths) == {32: 92, 4: 8}
    gaps = [b - a for a, b in itertools.pairwise(i for i, n in enumerate(lengths) if n == 4)]
    assert set(gaps) <= {12, 13}  # spread evenly, not in one block
    for step in range(100):
        ids = data.sample_ids(step)
        assert len(ids) * data.seq_len(step) == 64
        assert {s.source for s in ids} == ({"a"} if lengths[step] == 32 else {"b"})
    everything = [s for step in range(100) for s in data.sample_ids(step)]
    assert len(set(everything)) == len(everything)


def test_a_longer_run_begins_with_the_same_rows(folder: Path):
    one = phase("one", 3, 32, RowLength(8, 1.0, mix(folder, a=1, b=2)))
    longer = phase("one", 9, 32, RowLength(8, 1.0, mix(folder, a=1, b=2)))
    a, b = make_data(folder, one), make_data(folder, longer)
    assert [a.sample_ids(i) for i in range(3)] == [b.sample_ids(i) for i in range(3)]


def test_a_resumed_run_may_change_what_is_still_to_come_and_nothing_else(folder: Path):
    first = phase("one", 6, 32, RowLength(8, 1.0, mix(folder, a=1)))
    second = phase("two", 6, 32, RowLength(8, 1.0, mix(folder, b=1)))
    saved = json.loads(json.dumps(make_data(folder, first, second).fingerprint()))
    other = phase("other", 3, 64, RowLength(16, 1.0, mix(folder, c=1)))
    longer = phase("one", 9, 32, RowLength(8, 1.0, mix(folder, a=1)))
    make_data(folder, first, other).check_fingerprint(saved, 6)
    make_data(folder, longer, other).check_fingerprint(saved, 6)
    with pytest.raises(UserError, match=r"data\.sources was b when .* and is c now|seq_len|tokens"):
        make_data(folder, first, other).check_fingerprint(saved, 7)
    with pytest.raises(UserError, match=r"phases.0: steps was 6 .* and is 9 now"):
        make_data(folder, longer, second).check_fingerprint(saved, 10)


def test_one_name_cannot_mean_two_paths(folder: Path):
    strange = Leaf(source=SourceConfig(name="a", path=str(folder / "b")), weight=1, group=None)
    phases = [
        phase("one", 1, 32, RowLength(8, 1.0, mix(folder, a=1))),
        phase("two", 1, 32, RowLength(8, 1.0, (strange,))),
    ]
    with pytest.raises(UserError, match=r"phases name a with the paths .*a and .*b;"):
        make_data(folder, *phases)


def test_a_schedule_of_25_trillion_tokens_is_found_without_an_index(folder: Path):
    blend = mix(folder, a=14.0, b=0.05, c=85.95)
    one = phase("one", 933_806, 25_165_824, RowLength(8192 // 1024, 1.0, blend))
    two = phase("two", 59_605, 25_165_824, RowLength(8, 1.0, mix(folder, a=1, b=1)))
    data = make_data(folder, one, two)
    last = data.timeline.num_steps - 1
    assert data.timeline.num_tokens > 24.9e12
    assert len(data.sample_ids(last, slice(0, 4))) == 4
    read = data.tokens_read(data.timeline.num_steps)
    assert sum(read.values()) == data.timeline.num_tokens
    whole = 933_806 * 25_165_824
    # within two rows of the exact share at any time
    assert abs(read["c"] - whole * 0.8595) <= 2 * 8


def test_a_set_that_only_a_phase_names_is_evaluated(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("exams.txt").write_text("Which of these is right, and why? " * 40)
    Path("later.yaml").write_text("sources: [verse]\nvalidation: [exams.txt]\n")
    Path("mine.yaml").write_text(
        "extends: tiny/smoke\nname: mine\nremove: schedule.total_steps\n"
        "data: {sources: [verse]}\n"
        "phases: [{name: one, steps: 1}, {name: two, steps: 1, blend: later.yaml}]\n"
    )
    words = ["train", "mine.yaml", "device=cpu", "evaluation.tokens=64"]
    assert run(words) == 0
    lines = Path("runs/mine/metrics.jsonl").read_text().splitlines()
    found = [key for line in lines for key in json.loads(line) if key.startswith("validation/e")]
    assert "validation/exams/loss" in found
    Path("later.yaml").write_text("sources: [docs]\nvalidation: [{name: verse, path: exams.txt}]\n")
    for more in ([], ["--dry-run"]):
        assert run([*words, "name=other", *more]) == 2
        said = "phases name verse twice; give each source and set its own name."
        assert said in capfd.readouterr().err
