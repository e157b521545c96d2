"""Encoding documents: a long one in pieces has the ids that it has as a whole."""

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.prepare import encode
from nemotron.data.prepare.encode import Ids, LongDocument, encode_documents
from nemotron.data.prepare.read import Bad, Chunk
from nemotron.data.tokenizer import Tokenizer, load_tokenizer

TOKENIZER = load_tokenizer("embedded")
PIECES = [
    "a",
    "word",
    " ",
    "  ",
    "\n",
    "\n\n  ",
    "\t",
    "7",
    "'s",
    "é",
    "ß→",
    "</s>",
    "()",
    "x" * 30,
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=60).map("".join)


def encode_in_pieces(text: str, window: int, chunk: int, tokenizer: Tokenizer) -> list[Ids]:
    document = LongDocument(tokenizer, window)
    parts = []
    for start in range(0, len(text), chunk):
        parts += document.feed(text[start : start + chunk])
    return [*parts, document.finish()]


@given(TEXTS, st.integers(5, 40), st.integers(1, 30))
def test_pieces_have_the_ids_of_the_whole(text: str, window: int, chunk: int):
    parts = encode_in_pieces(text, window, chunk, TOKENIZER)
    assert [i for part in parts for i in part.ids] == TOKENIZER.encode(text)
    assert sum(part.num_bytes for part in parts) == len(text.encode())
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]


def test_long_text_does_come_in_pieces():
    assert len(encode_in_pieces("Some words, and more. " * 40, 60, 25, TOKENIZER)) > 5


def test_text_without_a_place_to_cut_is_encoded_as_one():
    assert len(encode_in_pieces("x" * 900, 50, 100, TOKENIZER)) == 1


@given(TEXTS, st.integers(5, 20))
def test_a_tokenizer_that_looks_at_the_beginning_is_never_fed_pieces(text: str, window: int):
    model = tokenizers.models.Unigram([("<unk>", 0.0), ("▁", -1.0), *_letters()], 0, True)
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    built.decoder = tokenizers.decoders.Metaspace()
    tokenizer = Tokenizer(built.to_str().encode())
    [part] = encode_in_pieces(text, window, 7, tokenizer)
    assert part.ids == tokenizer.encode(text)


def _letters() -> list[tuple[str, float]]:
    return [(chr(code), -2.0) for code in range(33, 127)]


def test_short_long_and_bad_documents_keep_their_order(monkeypatch):
    monkeypatch.setattr(encode, "LONG", 100)
    monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 3)
    texts = ["one", "two words. " * 30, "", "three", "four", "five", "six " * 60, "seven"]
    chunks: list[Chunk | Bad] = [Chunk(text, is_last=True) for text in texts]
    chunks.insert(3, Bad("x:3", "is bad"))
    chunks[7:8] = [Chunk("six " * 25, False), Chunk("six " * 35, True)]
    found, ids = [], []
    for part in encode_documents(chunks, TOKENIZER):
        if isinstance(part, Bad):
            found.append(part)
            continue
        ids += part.ids
        if part.is_last:
            found.append(ids)
            ids = []
    expected: list[list[int] | Bad] = [TOKENIZER.encode(text) for text in texts]
    expected.insert(3, Bad("x:3", "is bad"))
    assert found == expected


def test_a_document_that_turns_bad_half_way_is_not_joined_to_the_next():
    chunks = [Chunk("half ", False), Bad("f", "is not UTF-8 text"), Chunk("whole", True)]
    parts = list(encode_documents(chunks, TOKENIZER))
    assert [part for part in parts if isinstance(part, Ids)] == [
        Ids(TOKENIZER.encode("whole"), 5, True)
    ]
