import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.batch import NO_LABEL
from nemotron.data.config import DataConfig, SourceConfig
from nemotron.data.indexed import ShardWriter
from nemotron.data.loader import TrainingData
from nemotron.data.prepare import write_shard
from nemotron.data.tokenizer import load_tokenizer
from nemotron.errors import UserError

SEQ_LEN, ROWS, EOD = 7, 6, 2


def write_numbered(prefix: Path, first: int, count: int) -> None:
    """Write documents of 2 to 9 tokens, each of one id that no other document has."""
    lengths = np.random.default_rng(first).integers(1, 9, count)
    with ShardWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths):
            writer.add([*[first + number] * length, EOD])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_numbered(folder / "a", 100, 90)
    write_numbered(folder / "b", 1000, 37)
    return folder


def make_config(folder: Path, **changes: object) -> DataConfig:
    sources = [
        SourceConfig(name="a", weight=0.75, prefix=str(folder / "a")),
        SourceConfig(name="b", weight=0.25, prefix=str(folder / "b")),
    ]
    defaults = {"sources": sources, "cache": str(folder / "cache"), "seq_len": SEQ_LEN}
    return DataConfig(**(defaults | {"validation_fraction": 0.2} | changes))


def make_data(folder: Path, seed: int = 3, **changes: object) -> TrainingData:
    config = make_config(folder, **changes)
    return TrainingData(config, seed=seed, rows_per_step=ROWS, vocab_size=4096)


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainingData:
    return make_data(folder)


def ids_of(data: TrainingData, domain: str) -> set[int]:
    """Ids of all held-out tokens of a domain."""
    batches = data.validation(domain, tokens=10**6, rows=4)
    return {i for part in batches for i in part.batch.input_ids.flatten().tolist()} - {EOD}


def epoch_of(data: TrainingData, name: str, epoch: int) -> Iterator[tuple[int, list[int]]]:
    """Yield sample number and first tokens of every row of one pass over a source."""
    for step in range(200):
        batch = data.batch(step)
        for row, sample in enumerate(data.sample_ids(step)):
            if (sample.source, sample.epoch) == (name, epoch):
                yield sample.sample, batch.input_ids[row].tolist()


@given(st.integers(0, 10**9), st.integers(1, ROWS))
def test_a_step_is_the_same_in_any_portions_and_from_any_start(data, step: int, micro_batch: int):
    whole = data.batch(step)
    fresh = make_data(Path(data.config.cache).parent).batch(step)
    assert torch.equal(whole.input_ids, fresh.input_ids)
    parts = [part.input_ids for part in whole.split(micro_batch)]
    ranks = [data.batch(step, slice(i, i + micro_batch)) for i in range(0, ROWS, micro_batch)]
    for part, rank in zip(parts, ranks, strict=True):
        assert torch.equal(part, rank.input_ids)
    assert torch.equal(torch.cat([rank.labels for rank in ranks]), whole.labels)
    assert torch.equal(torch.cat([rank.seq_idx for rank in ranks]), whole.seq_idx)


def test_another_grouping_into_steps_gives_the_same_rows(folder: Path, data: TrainingData):
    config = make_config(folder)
    other = TrainingData(config, seed=3, rows_per_step=4, vocab_size=4096)
    ours = torch.cat([data.batch(step).input_ids for step in range(2)])
    theirs = torch.cat([other.batch(step).input_ids for step in range(3)])
    assert torch.equal(ours, theirs)


def test_each_epoch_takes_every_sample_once_in_another_order(data: TrainingData):
    for name, source in data.sources.items():
        orders = [[sample for sample, _ in epoch_of(data, name, epoch)] for epoch in range(3)]
        for order in orders:
            assert sorted(order) == list(range(source.num_samples))
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != sorted(orders[0])


def test_an_epoch_covers_all_training_tokens_but_less_than_a_row(data: TrainingData):
    source = data.sources["a"]
    line = Counter(source.train.read(0, source.train.num_tokens).tolist())
    for epoch in (0, 1):
        rows = Counter(t for _, row in epoch_of(data, "a", epoch) for t in row)
        assert not rows - line
        assert sum((line - rows).values()) < SEQ_LEN


def test_epochs_are_cut_at_other_places(data: TrainingData):
    firsts = [{tuple(row) for _, row in epoch_of(data, "a", epoch)} for epoch in (0, 1)]
    assert firsts[0] != firsts[1]


def test_neighbouring_samples_share_one_token(data: TrainingData):
    source = data.sources["b"]
    windows = [source.window(4, sample) for sample in range(source.num_samples)]
    for left, right in itertools.pairwise(windows):
        assert len(left) == SEQ_LEN + 1
        assert left[-1] == right[0]


def test_rows_come_from_sources_by_their_weights(data: TrainingData):
    names = [sample.source for step in range(20) for sample in data.sample_ids(step)]
    assert Counter(names) == {"a": 90, "b": 30}
    assert data.epochs(20) == {
        "a": 90 / data.sources["a"].num_samples,
        "b": 30 / data.sources["b"].num_samples,
    }


def test_a_seed_changes_the_order(folder: Path, data: TrainingData):
    assert make_data(folder, seed=4).sample_ids(0) != data.sample_ids(0)


def test_adding_a_source_keeps_the_order_inside_the_others(folder: Path, data: TrainingData):
    alone = make_data(folder, sources=[SourceConfig(name="a", prefix=str(folder / "a"))])
    ours = [s for step in range(8) for s in data.sample_ids(step) if s.source == "a"]
    assert alone.sample_ids(0) + alone.sample_ids(1) == ours[: 2 * ROWS]


def test_no_held_out_document_is_trained_on(data: TrainingData):
    trained = {t for step in range(100) for t in data.batch(step).input_ids.flatten().tolist()}
    for domain in ("a", "b"):
        assert len(ids_of(data, domain)) > 3
        assert not ids_of(data, domain) & trained


def test_held_out_rows_are_fixed_and_keep_to_the_budget(data: TrainingData):
    budget = 2 * 3 * SEQ_LEN  # three rows for each of the two domains
    parts = [list(data.validation("a", tokens=budget, rows=2)) for _ in range(2)]
    shapes = [tuple(part.batch.input_ids.shape) for part in parts[0]]
    assert shapes == [(2, SEQ_LEN), (1, SEQ_LEN)]
    for one, two in zip(*parts, strict=True):
        assert torch.equal(one.batch.labels, two.batch.labels)
    everything = list(data.validation("a", tokens=10**6, rows=3))
    held_out = data.sources["a"].validation.num_tokens
    assert sum(part.batch.num_loss_tokens for part in everything) == held_out - 1
    first = torch.cat([part.batch.input_ids for part in parts[0]])
    assert torch.equal(first, torch.cat([part.batch.input_ids for part in everything])[:3])


def test_held_out_text_that_fills_its_rows_gets_no_row_without_labels(folder: Path):
    tokens = make_data(folder).sources["a"].validation.num_tokens
    (part,) = make_data(folder, seq_len=tokens - 1).validation("a", tokens=10**6, rows=9)
    assert tuple(part.batch.labels.shape) == (1, tokens - 1)
    assert part.batch.num_loss_tokens == tokens - 1


def test_the_bytes_of_held_out_labels_are_those_of_the_text(tmp_path: Path):
    texts = [f"Document {i}: naïve → {'ß' * (i % 5)}\n" for i in range(60)]
    prefix = write_shard(texts, tmp_path / "text", load_tokenizer("embedded"))
    data = make_data(tmp_path, sources=[SourceConfig(name="t", prefix=str(prefix))])
    stream = data.sources["t"].validation
    tokens = stream.read(0, stream.num_tokens).tolist()
    text = data.tokenizer.decode(tokens, skip_specials=True)
    unlabelled = data.tokenizer.decode(tokens[:1])
    counted = sum(part.num_bytes for part in data.validation("t", tokens=10**6, rows=5))
    assert counted == len(text.encode()) - len(unlabelled.encode())


def test_a_source_without_held_out_documents_is_no_validation_domain(folder: Path):
    data = make_data(folder, validation_fraction=0.0)
    assert data.validation_domains == []
    assert make_data(folder).validation_domains == ["a", "b"]


def test_labels_after_an_end_of_document_can_be_left_out(folder: Path, data: TrainingData):
    masked = make_data(folder, mask_eod_loss=True).batch(5)
    plain = data.batch(5)
    ends = plain.input_ids == EOD
    assert ends.any()
    assert torch.equal(masked.labels, plain.labels.masked_fill(ends, NO_LABEL))


def test_the_embedded_corpus_works_without_any_setting(tmp_path: Path):
    config = DataConfig(cache=str(tmp_path / "new" / "cache"))
    data = TrainingData(config, seed=0, rows_per_step=10, vocab_size=4096)
    batch = data.batch(0)
    assert tuple(batch.input_ids.shape) == (10, 512)
    names = Counter(sample.source for sample in data.sample_ids(0))
    assert names == {"code": 5, "docs": 3, "verse": 2}
    assert data.validation_domains == ["code", "docs", "verse"]
    for source in data.sources.values():
        assert source.validation.num_tokens > 15_000
        assert source.train.num_tokens > 300_000
    assert [line.split(":")[0] for line in data.describe()] == ["code", "docs", "verse"]


def test_a_run_that_needs_too_many_epochs_is_refused(folder: Path):
    data = make_data(folder, max_epochs=2.5)
    most = int(2.5 * data.sources["b"].num_samples / (ROWS / 4))
    data.check_length(most // 2)
    sentence = r"data.sources: 1000 steps need \d+ tokens of a, which has \d+: \d+\.\d\d passes"
    with pytest.raises(UserError, match=sentence + r", where data.max_epochs = 2.5; train for"):
        data.check_length(1000)
    make_data(folder).check_length(10**9)


def refuse(folder: Path, **changes: object) -> str:
    with pytest.raises(UserError) as refusal:
        make_data(folder, **changes)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_an_id_outside_the_vocabulary_is_named_before_training(folder: Path):
    with ShardWriter(folder / "wild", np.int32) as writer:
        for document in ([5, 6, EOD], [7, 5000, EOD], [5001, EOD]):
            writer.add(document)
    source = SourceConfig(name="w", prefix=str(folder / "wild"))
    text = refuse(folder, sources=[source], validation_fraction=0.0)
    assert "wild.bin holds the id 5001 (document 2, position 0), but the vocabulary ends" in text


def test_settings_that_do_not_fit_are_refused(folder: Path, tmp_path: Path):
    source = SourceConfig(name="x", prefix=str(folder / "missing"))
    assert "missing.bin does not exist" in refuse(folder, sources=[source])
    assert "tokens to train on; a row of data.seq_len = 100000" in refuse(folder, seq_len=100_000)
    assert "has no token '<end>'" in refuse(folder, eod_token="<end>")
    (tmp_path / "file").touch()
    text = refuse(folder, cache=str(tmp_path / "file"))
    assert f"data.cache: {tmp_path}/file cannot be written (File exists)" in text


def test_documents_without_the_right_end_are_warned_of(folder: Path, caplog):
    make_data(folder, eod_token="<|im_end|>")
    assert "ends with id 2, not with data.eod_token = <|im_end|> (id 11)" in caplog.text


@pytest.fixture
def own(tmp_path: Path) -> TrainingData:
    write_numbered(tmp_path / "a", 100, 40)
    write_numbered(tmp_path / "b", 500, 40)
    return make_data(tmp_path)


def test_a_shard_replaced_during_the_run_is_named(own: TrainingData, tmp_path: Path):
    own.batch(0)
    write_numbered(tmp_path / "b", 501, 40)
    with pytest.raises(UserError, match=r"b\.bin was changed while it was in use"):
        own.batch(1)
    with pytest.raises(UserError, match=r"b\.bin was changed while it was in use"):
        list(own.validation("b", tokens=100, rows=2))


def test_bits_that_rot_after_the_first_reading_are_noticed(own: TrainingData, tmp_path: Path):
    path = tmp_path / "a.bin"
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"\xff" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"a\.bin holds ids outside 0 to 4095"):
        own.batch(0)


def test_the_same_data_is_accepted_after_a_copy(own: TrainingData, tmp_path: Path):
    saved = json.loads(json.dumps(own.fingerprint()))
    for end in ("bin", "idx"):
        path = tmp_path / f"a.{end}"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    os.utime(tmp_path / "b.bin", (1, 1))
    make_data(tmp_path).check_fingerprint(saved)


def test_a_shard_replaced_between_runs_is_named(own: TrainingData, tmp_path: Path):
    saved = json.loads(json.dumps(own.fingerprint()))
    content = bytearray((tmp_path / "b.bin").read_bytes())
    content[6] ^= 1
    (tmp_path / "b.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"b\.bin is not the file that the checkpoint was trained"):
        make_data(tmp_path).check_fingerprint(saved)


def test_changed_settings_are_named_with_old_and_new_value(own: TrainingData, tmp_path: Path):
    saved = own.fingerprint()
    sources = own.config.sources
    heavier = [sources[0], sources[1].model_copy(update={"weight": 0.5})]
    changes = {
        "seed was 3 when .* and is 4 now": {"seed": 4},
        "data.seq_len was 7 when .* and is 8 now": {"seq_len": 8},
        "data.sources was a, b when .* and is a now": {"sources": sources[:1]},
        r"the weight of b was 0\.25 when .* and is 0\.5 now": {"sources": heavier},
    }
    for sentence, change in changes.items():
        with pytest.raises(UserError, match=sentence):
            make_data(tmp_path, **change).check_fingerprint(saved)
