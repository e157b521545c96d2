from pathlib import Path

import numpy as np
import pytest

from nemotron.data import split as split_module
from nemotron.data.indexed import Shard, ShardWriter
from nemotron.data.split import Split, split_shard

RANDOM = np.random.default_rng(5)
DOCUMENTS = [RANDOM.integers(0, 5000, RANDOM.integers(1, 12)).tolist() for _ in range(1500)]


def make_split(
    folder: Path, documents: list[list[int]], fraction: float, dtype: type = np.uint16
) -> tuple[Shard, Split]:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder / "shard", dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=np.int64))
    shard = Shard(folder / "shard")
    return shard, split_shard(shard, fraction, folder)


def held_out(shard: Shard, split: Split) -> set[tuple[int, ...]]:
    return {tuple(shard.document(int(i)).tolist()) for i in split.validation}


def test_only_the_content_decides_what_is_held_out(tmp_path: Path):
    one = held_out(*make_split(tmp_path / "a", DOCUMENTS, 0.1))
    turned = held_out(*make_split(tmp_path / "b", DOCUMENTS[::-1], 0.1, np.int32))
    fewer = held_out(*make_split(tmp_path / "c", DOCUMENTS[::2], 0.1, np.int64))
    assert one == turned
    assert fewer == one & set(map(tuple, DOCUMENTS[::2]))


def test_a_larger_fraction_holds_out_more_and_keeps_what_it_had(tmp_path: Path):
    sets = [
        held_out(*make_split(tmp_path / str(fraction), DOCUMENTS, fraction))
        for fraction in (0.0, 0.05, 0.3, 0.9)
    ]
    assert sets[0] == set()
    assert sets[1] < sets[2] < sets[3]
    # Four standard deviations of a binomial count.
    for found, fraction in zip(sets[1:], (0.05, 0.3, 0.9), strict=True):
        spread = 4 * (1500 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(found) - 1500 * fraction) < spread


def test_both_sides_together_are_all_documents_that_hold_tokens(tmp_path: Path, caplog):
    documents = [[], *DOCUMENTS[:50], [], [4]]
    shard, split = make_split(tmp_path, documents, 0.4)
    both = np.sort(np.concatenate([split.train, split.validation]))
    assert both.tolist() == [i for i, document in enumerate(documents) if document]
    for numbers, ends in (
        (split.train, split.train_ends),
        (split.validation, split.validation_ends),
    ):
        assert ends.tolist() == np.cumsum([len(documents[i]) for i in numbers]).tolist()
    assert (split.contents.documents, split.contents.empty_documents) == (51, 2)
    assert split.contents.tokens == shard.num_tokens == sum(map(len, documents))
    assert "skipped 2 empty documents" in caplog.text


@pytest.mark.parametrize(("odd", "dtype"), [(60000, np.uint16), (-3, np.int32), (2**40, np.int64)])
def test_the_id_that_fits_no_vocabulary_is_found_with_its_place(tmp_path: Path, odd, dtype):
    contents = make_split(tmp_path, [[9, 2], [], [7, odd, 1], [odd]], 0.1, dtype)[1].contents
    assert (contents.largest, contents.largest_document, contents.largest_position) == (odd, 2, 1)


def test_a_second_start_reads_no_tokens(tmp_path: Path, monkeypatch):
    shard, first = make_split(tmp_path, DOCUMENTS[:40], 0.3)
    monkeypatch.delattr(split_module, "_scan")
    second = split_shard(shard, 0.3, tmp_path)
    assert second.contents == first.contents
    assert second.train.tolist() == first.train.tolist()
    assert second.validation_ends.tolist() == first.validation_ends.tolist()


def test_changed_tokens_are_read_again(tmp_path: Path):
    first = make_split(tmp_path, [[1, 2, 3], [4]], 0.5)[1].contents
    second = make_split(tmp_path, [[1, 2, 5], [4]], 0.5)[1].contents
    assert first.hash != second.hash
    assert first.tokens == second.tokens
