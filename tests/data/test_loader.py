import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.batch import NO_LABEL
from nemotron.data.config import DataConfig, SourceConfig, leaves
from nemotron.data.loader import TextBatches, TrainingData, rows_of_rank
from nemotron.data.mixture import single_phase
from nemotron.data.prepare.writer import ShardWriter
from nemotron.data.source import Source
from nemotron.errors import UserError
from tests.support.prepared import write_ids, write_prepared

SEQ_LEN, ROWS, EOD = 7, 6, 2


def write_numbered(folder: Path, first: int, count: int, fraction: float = 0.2) -> None:
    """Write documents of 2 to 9 tokens, each of one id that no other document has."""
    lengths = np.random.default_rng(first).integers(1, 9, count)
    documents = ([first + number] * int(length) for number, length in enumerate(lengths))
    write_ids(documents, folder, validation_fraction=fraction)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_numbered(folder / "a", 100, 90)
    write_numbered(folder / "b", 1000, 37)
    return folder


def make_config(folder: Path, **changes: object) -> DataConfig:
    sources = [
        SourceConfig(name="a", weight=0.75, path=str(folder / "a")),
        SourceConfig(name="b", weight=0.25, path=str(folder / "b")),
    ]
    defaults = {"sources": sources, "cache": str(folder / "cache"), "seq_len": SEQ_LEN}
    return DataConfig(**(defaults | changes))


def open_data(config: DataConfig, *, seed: int = 3, rows: int = ROWS, steps: int = 200):
    timeline = single_phase(leaves(config.blend), config.seq_len, rows * config.seq_len, steps)
    return TrainingData(config, timeline, seed=seed, vocab_size=4096)


def make_data(folder: Path, seed: int = 3, steps: int = 200, **changes: object) -> TrainingData:
    return open_data(make_config(folder, **changes), seed=seed, steps=steps)


@pytest.fixture(scope="module")
def data(folder: Path) -> TrainingData:
    return make_data(folder)


def sources_of(data: TrainingData) -> dict[str, Source]:
    """Return the rows of each source of a run with one length of row."""
    return {name: source for (name, _), source in data.mixtures.sources.items()}


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


@pytest.mark.gpu
def test_rows_for_a_gpu_wait_in_pinned_memory(data: TrainingData):
    options = {"reader": 0, "num_readers": 1, "num_steps": 9, "num_depths": 0}
    batch = TextBatches(data.config, data, **options, pin=True).take(3)
    assert batch.input_ids.is_pinned()
    assert torch.equal(batch.to("cuda").labels.cpu(), batch.labels)


@pytest.mark.slow
@given(st.integers(0, 10**9), st.integers(1, ROWS))
def test_a_step_is_the_same_in_any_micro_batches_and_from_any_start(
    data, step: int, micro_batch: int
):
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
    other = open_data(config, rows=4)
    ours = torch.cat([data.batch(step).input_ids for step in range(2)])
    theirs = torch.cat([other.batch(step).input_ids for step in range(3)])
    assert torch.equal(ours, theirs)


def test_each_epoch_takes_every_sample_once_in_another_order(data: TrainingData):
    for name, source in sources_of(data).items():
        orders = [[sample for sample, _ in epoch_of(data, name, epoch)] for epoch in range(3)]
        for order in orders:
            assert sorted(order) == list(range(source.num_rows))
        assert orders[0] != orders[1] != orders[2]
        assert orders[0] != sorted(orders[0])


def test_an_epoch_covers_all_training_tokens_but_less_than_a_row(data: TrainingData):
    train = data.tokens["a"].train
    line = Counter(train.read(0, train.num_tokens).tolist())
    for epoch in (0, 1):
        rows = Counter(t for _, row in epoch_of(data, "a", epoch) for t in row)
        assert not rows - line
        assert sum((line - rows).values()) < SEQ_LEN


def test_epochs_are_cut_at_other_places(data: TrainingData):
    firsts = [{tuple(row) for _, row in epoch_of(data, "a", epoch)} for epoch in (0, 1)]
    assert firsts[0] != firsts[1]


def test_neighboring_samples_share_one_token(data: TrainingData):
    source = sources_of(data)["b"]
    windows = [source.row(4, sample).tokens for sample in range(source.num_rows)]
    for left, right in itertools.pairwise(windows):
        assert len(left) == SEQ_LEN + 1
        assert left[-1] == right[0]


def test_rows_come_from_sources_by_their_weights(data: TrainingData):
    names = [sample.source for step in range(20) for sample in data.sample_ids(step)]
    assert Counter(names) == {"a": 90, "b": 30}
    rows = {name: source.num_rows for name, source in sources_of(data).items()}
    assert data.epochs(20) == {"a": 90 / rows["a"], "b": 30 / rows["b"]}
    assert data.tokens_read(20) == {"a": 90 * SEQ_LEN, "b": 30 * SEQ_LEN}


def test_a_seed_changes_the_order(folder: Path, data: TrainingData):
    assert make_data(folder, seed=4).sample_ids(0) != data.sample_ids(0)


def test_adding_a_source_keeps_the_order_inside_the_others(folder: Path, data: TrainingData):
    alone = make_data(folder, sources=[SourceConfig(name="a", path=str(folder / "a"))])
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
    held_out = data.tokens["a"].validation.num_tokens
    assert sum(part.batch.num_loss_tokens for part in everything) == held_out - 1
    first = torch.cat([part.batch.input_ids for part in parts[0]])
    assert torch.equal(first, torch.cat([part.batch.input_ids for part in everything])[:3])


def test_held_out_text_that_fills_its_rows_gets_no_row_without_labels(folder: Path):
    tokens = make_data(folder).tokens["a"].validation.num_tokens
    (part,) = make_data(folder, seq_len=tokens - 1).validation("a", tokens=10**6, rows=9)
    assert tuple(part.batch.labels.shape) == (1, tokens - 1)
    assert part.batch.num_loss_tokens == tokens - 1


def test_the_bytes_of_held_out_labels_are_those_of_the_text(tmp_path: Path):
    texts = [f"Document {i}: naïve → {'ß' * (i % 5)}\n" for i in range(60)]
    path = write_prepared(texts, tmp_path / "text", validation_fraction=0.2)
    data = make_data(tmp_path, sources=[SourceConfig(name="t", path=str(path))])
    stream = data.tokens["t"].validation
    tokens = stream.read(0, stream.num_tokens).tolist()
    text = data.tokenizer.decode(tokens, skip_specials=True)
    unlabeled = data.tokenizer.decode(tokens[:1])
    counted = sum(part.num_bytes for part in data.validation("t", tokens=10**6, rows=5))
    assert counted == len(text.encode()) - len(unlabeled.encode())


def test_a_source_without_held_out_documents_is_no_validation_domain(folder: Path):
    write_numbered(folder / "all", 2000, 30, fraction=0.0)
    everything = SourceConfig(name="all", path=str(folder / "all"))
    assert make_data(folder, sources=[everything]).validation_domains == []
    assert make_data(folder).validation_domains == ["a", "b"]


def test_held_out_text_may_lie_beside_a_source_or_be_a_set_of_its_own(folder: Path):
    write_numbered(folder / "c", 3000, 9, fraction=0.0)
    beside = SourceConfig(name="a", path=str(folder / "a"), validation=str(folder / "c"))
    extra = {"name": "extra", "path": str(folder / "b")}
    data = make_data(folder, sources=[beside], validation=[extra])
    assert data.validation_domains == ["a", "extra"]
    assert min(ids_of(data, "a")) >= 3000
    assert ids_of(data, "extra") == set(range(1000, 1037))


def test_labels_after_an_end_of_document_can_be_left_out(folder: Path, data: TrainingData):
    masked = make_data(folder, mask_eod_loss=True).batch(5)
    plain = data.batch(5)
    ends = plain.input_ids == EOD
    assert ends.any()
    assert torch.equal(masked.labels, plain.labels.masked_fill(ends, NO_LABEL))


def test_the_embedded_corpus_works_without_any_setting(tmp_path: Path):
    config = DataConfig(cache=str(tmp_path / "new" / "cache"))
    data = open_data(config, seed=0, rows=10)
    batch = data.batch(0)
    assert tuple(batch.input_ids.shape) == (10, 512)
    names = Counter(sample.source for sample in data.sample_ids(0))
    assert names == {"code": 5, "docs": 3, "verse": 2}
    assert data.validation_domains == ["code", "docs", "verse"]
    for tokens in data.tokens.values():
        assert tokens.validation.num_tokens > 15_000
        assert tokens.train.num_tokens > 300_000
    assert [line.split(":")[0] for line in data.describe()] == ["code", "docs", "verse"]


def test_a_run_that_needs_too_many_epochs_is_refused(folder: Path):
    rows = sources_of(make_data(folder))["b"].num_rows
    most = int(2.5 * rows / (ROWS / 4))
    make_data(folder, max_epochs=2.5, steps=most // 2).check_length()
    sentence = r"data\.sources do not suffice: 1000 steps need \d+ tokens of a, which has \d+: "
    sentence += r"\d+\.\d\d passes"
    with pytest.raises(UserError, match=sentence + r", where max_epochs = 2.5; train for"):
        make_data(folder, max_epochs=2.5, steps=1000).check_length()
    make_data(folder, steps=10**9).check_length()


def test_a_source_has_a_limit_of_its_own(folder: Path):
    sources = [
        source.model_copy(update={"max_epochs": limit})
        for source, limit in zip(make_config(folder).sources, (None, 1.5), strict=True)
    ]
    with pytest.raises(UserError, match=r"tokens of b, .* max_epochs = 1\.5"):
        make_data(folder, sources=sources, steps=100).check_length()


def refuse(folder: Path, **changes: object) -> str:
    with pytest.raises(UserError) as refusal:
        make_data(folder, **changes)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_an_id_outside_the_vocabulary_is_named_before_training(folder: Path):
    with ShardWriter(folder / "wild", np.int32) as writer:
        for document in ([5, 6, EOD], [7, 5000, EOD], [5001, EOD]):
            writer.add(document)
    source = SourceConfig(name="w", path=str(folder / "wild"))
    text = refuse(folder, sources=[source])
    assert (
        "wild.bin: contains the id 5001 (document 2, position 0), but the vocabulary ends" in text
    )


def test_settings_that_do_not_fit_are_refused(folder: Path, tmp_path: Path):
    source = SourceConfig(name="x", path=str(folder / "missing"))
    assert "missing: does not exist, nor does a shard" in refuse(folder, sources=[source])
    assert "tokens to train on, but a row of data.seq_len = 100000" in refuse(
        folder, seq_len=100_000
    )
    (folder / "nothing").mkdir()
    source = SourceConfig(name="x", path=str(folder / "nothing"))
    assert "contains neither manifest.json nor shards" in refuse(folder, sources=[source])
    assert "has no token '<end>'" in refuse(folder, eod_token="<end>")
    (tmp_path / "file").touch()
    text = refuse(folder, cache=str(tmp_path / "file"))
    assert f"data.cache = {tmp_path}/file cannot be written: Not a directory" in text


def test_another_end_of_documents_than_that_of_the_shards_is_refused(folder: Path):
    text = refuse(folder, eod_token="<|im_end|>")
    assert "eod_id = 2 is not the id of data.eod_token = <|im_end|>, which is 11" in text


def test_foreign_documents_without_the_right_end_are_warned_of(folder: Path, caplog):
    with ShardWriter(folder / "foreign", np.int32) as writer:
        writer.add([5, 6, 7, 8] * 20)
    make_data(folder, sources=[SourceConfig(name="f", path=str(folder / "foreign"))])
    assert (
        "foreign: a document ends with id 8, not with data.eod_token = </s> (id 2)" in caplog.text
    )


@pytest.fixture
def own(tmp_path: Path) -> TrainingData:
    write_numbered(tmp_path / "a", 100, 40)
    write_numbered(tmp_path / "b", 500, 40)
    return make_data(tmp_path)


def test_a_shard_replaced_during_the_run_is_named(own: TrainingData, tmp_path: Path):
    own.batch(0)
    write_numbered(tmp_path / "b", 501, 40)
    with pytest.raises(UserError, match=r"\.bin: was changed while it was in use"):
        own.batch(1)
    with pytest.raises(UserError, match=r"\.bin: was changed while it was in use"):
        list(own.validation("b", tokens=100, rows=2))


def test_bits_that_rot_after_the_first_reading_are_noticed(own: TrainingData, tmp_path: Path):
    path = tmp_path / "a" / "train-00000.bin"
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(b"\xff" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        UserError, match=r"a: contains the id 65535, but the vocabulary ends at 4095"
    ):
        own.batch(0)


def test_the_same_data_is_accepted_after_a_copy(own: TrainingData, tmp_path: Path):
    saved = json.loads(json.dumps(own.fingerprint()))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "copy").rename(tmp_path / "a")
    make_data(tmp_path).check_fingerprint(saved, 1)


def test_a_source_prepared_anew_between_runs_is_named(own: TrainingData, tmp_path: Path):
    saved = json.loads(json.dumps(own.fingerprint()))
    write_numbered(tmp_path / "b", 501, 40)
    with pytest.raises(
        UserError, match=r"b: differs from the data that the checkpoint was trained on: it has"
    ):
        make_data(tmp_path).check_fingerprint(saved, 1)


def test_a_foreign_shard_replaced_between_runs_is_named(own: TrainingData, tmp_path: Path):
    (tmp_path / "b" / "manifest.json").unlink()
    saved = json.loads(json.dumps(make_data(tmp_path).fingerprint()))
    content = bytearray((tmp_path / "b" / "train-00000.bin").read_bytes())
    content[6] ^= 1
    (tmp_path / "b" / "train-00000.bin").write_bytes(content)
    with pytest.raises(
        UserError, match=r"b: differs from the data that the checkpoint was trained on"
    ):
        make_data(tmp_path).check_fingerprint(saved, 1)


def test_changed_settings_are_named_with_old_and_new_value(own: TrainingData, tmp_path: Path):
    saved = own.fingerprint()
    sources = own.config.sources
    heavier = [sources[0], sources[1].model_copy(update={"weight": 0.5})]
    changes = {
        "seed was 3 when .* and is 4 now": {"seed": 4},
        "data.seq_len was 7 when .* and is 8 now": {"seq_len": 8},
        "data.sources was a, b when .* and is a now": {"sources": sources[:1]},
        r"the weight of b was 0\.25 when .* and is 0\.5 now": {"sources": heavier},
        "data.mask_eod_loss was False when .* and is True now": {"mask_eod_loss": True},
    }
    for sentence, change in changes.items():
        with pytest.raises(UserError, match=sentence):
            make_data(tmp_path, **change).check_fingerprint(saved, 1)


def test_the_order_is_the_same_for_any_number_of_ranks_and_any_micro_batches(folder: Path):
    data = open_data(make_config(folder), rows=8)
    digests = set()
    for ranks in (1, 2, 4, 8):
        for micro_batch in (1, 2, 8):
            inputs, labels = hashlib.sha256(), hashlib.sha256()
            for step in range(20):
                for rank in range(ranks):
                    for part in data.batch(step, rows_of_rank(8, rank, ranks)).split(micro_batch):
                        inputs.update(part.input_ids.numpy().tobytes())
                        labels.update(part.labels.numpy().tobytes())
            digests.add((inputs.hexdigest(), labels.hexdigest()))
    assert len(digests) == 1


def test_ranks_that_cannot_share_the_rows_are_refused():
    with pytest.raises(UserError, match="6 rows a step, which 4 data-parallel ranks cannot share"):
        rows_of_rank(ROWS, 0, 4)


def test_a_set_or_a_source_without_a_row_to_evaluate_is_said(tmp_path: Path, caplog):
    write_numbered(tmp_path / "a", 100, 90, fraction=0)
    write_numbered(tmp_path / "b", 1000, 37, fraction=1e-9)
    caplog.clear()
    data = make_data(tmp_path)
    assert data.validation_domains == []
    (of_b, of_run) = caplog.messages
    assert "b has 0 documents with 0 tokens held out, so it is not evaluated" in of_b
    assert "this run has no validation loss" in of_run
    # documents of 9 tokens and more, which packing drops from rows of 8
    write_ids([[5] * 9, [6] * 11], tmp_path / "long", validation_fraction=0)
    packing = {"kind": "best_fit", "long_documents": "drop"}
    with pytest.raises(UserError, match=r"data\.validation = long has 2 documents .* make no row"):
        make_data(
            tmp_path, packing=packing, validation=[{"name": "long", "path": str(tmp_path / "long")}]
        )
