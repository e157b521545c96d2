"""Many shards as one line of tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.indexed import Shard, Stream
from nemotron.data.prepare.writer import ShardWriter
from nemotron.errors import UserError

SHARDS = [[[1, 2, 3], [], [4]], [[]], [[5, 6, 7, 8, 9]], [[10, 11], [12]]]


def write(prefix: Path, documents: list[list[int]], *, learned: bool = False) -> Shard:
    with ShardWriter(prefix, np.uint16, supervised=learned) as writer:
        for document in documents:
            ids = np.array(document, dtype=np.int64)
            writer.add(ids, ids % 2 if learned else None)
    return Shard(prefix)


@given(
    st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1).filter(lambda chosen: set(chosen) != {1}),
    st.integers(0, 40),
    st.integers(0, 30),
)
def test_reading_is_a_window_of_the_shards_end_to_end_repeated(
    tmp_path_factory, chosen: list[int], start: int, count: int
):
    folder = tmp_path_factory.mktemp("stream")
    stream = Stream([write(folder / f"{n}", SHARDS[i]) for n, i in enumerate(chosen)])
    line = [token for i in chosen for document in SHARDS[i] for token in document]
    assert stream.num_tokens == len(line)
    assert stream.read(start, count).tolist() == (line * 80)[start : start + count]
    assert stream.read_learned(start, count).all()


def test_what_is_learned_is_read_at_the_same_places(tmp_path: Path):
    stream = Stream([write(tmp_path / f"{i}", SHARDS[i], learned=True) for i in (0, 2)])
    assert stream.is_supervised
    tokens = stream.read(2, 30)
    assert stream.read_learned(2, 30).tolist() == (tokens % 2 == 1).tolist()


def test_a_shard_that_does_not_say_what_is_learned_is_named_beside_one_that_does(tmp_path: Path):
    shards = [write(tmp_path / "a", SHARDS[0], learned=True), write(tmp_path / "b", SHARDS[2])]
    with pytest.raises(UserError, match=r"b\.loss: is missing, but other shards have theirs"):
        Stream(shards)


def test_a_file_of_learned_tokens_that_is_cut_off_is_named(tmp_path: Path):
    stream = Stream([write(tmp_path / "a", SHARDS[2], learned=True)])
    (tmp_path / "a.loss").write_bytes(b"\1\1")
    with pytest.raises(UserError, match=r"a\.loss: has 2 bytes for 5 tokens"):
        stream.read_learned(0, 1)


def test_the_identity_changes_with_any_byte_near_the_ends_and_with_the_size(tmp_path: Path):
    seen = {Stream([write(tmp_path / "a", SHARDS[0])]).identity()}
    for documents in ([[1, 2, 3], [], [5]], [[2, 2, 3], [], [4]], [[1, 2, 3], [4]], [[1, 2, 3, 4]]):
        seen.add(Stream([write(tmp_path / "a", documents)]).identity())
    assert len(seen) == 5
