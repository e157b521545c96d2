import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.indexed import Shard, ShardWriter
from nemotron.data.source import Stream

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], [10, 11], [12]]


@given(
    st.sets(st.sampled_from([0, 2, 3, 4, 5]), min_size=1), st.integers(0, 40), st.integers(0, 30)
)
def test_reading_is_a_window_of_the_chosen_documents_repeated(
    tmp_path_factory, chosen: set[int], start: int, count: int
):
    prefix = tmp_path_factory.mktemp("stream") / "shard"
    with ShardWriter(prefix, np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document, dtype=np.int64))
    numbers = np.array(sorted(chosen))
    lengths = [len(DOCUMENTS[i]) for i in numbers]
    stream = Stream(Shard(prefix), numbers, np.cumsum(lengths))
    line = [token for i in numbers for token in DOCUMENTS[i]]
    assert stream.num_tokens == len(line)
    assert stream.read(start, count).tolist() == (line * 80)[start : start + count]
