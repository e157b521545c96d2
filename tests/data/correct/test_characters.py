"""The tokenizer of characters and the special tokens of text correction."""

import pytest

from nemotron.data.bpe import SPECIALS
from nemotron.data.correct.characters import (
    CHARACTER_SPECIALS,
    character_tokenizer,
    count_characters,
)
from nemotron.data.correct.marks import Marks, marks_of
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError

TEXTS = ["我们去公园。", "我 們go to\n公园了", "<void>😀é"]


def tokenizer(most: int | None = None) -> Tokenizer:
    return Tokenizer(character_tokenizer(count_characters(TEXTS), most).encode())


def test_each_character_is_a_token_and_texts_come_back():
    for text in TEXTS:
        ids = tokenizer().encode(text)
        assert len(ids) == len(text)
        assert min(ids) >= len(SPECIALS)
        assert tokenizer().decode(ids) == text


def test_the_most_frequent_characters_come_first_whatever_the_order_of_texts():
    first, last = (
        character_tokenizer(count_characters(texts)) for texts in (TEXTS, reversed(TEXTS))
    )
    assert first == last
    made = tokenizer(len(SPECIALS) + 3)
    assert made.vocab_size == len(SPECIALS) + 3
    # of those that stand twice, the first come in the order of Unicode
    assert [made.token(len(SPECIALS) + i) for i in range(3)] == ["o", " ", "公"]
    assert made.encode("公x o") == [34, made.id("<unk>"), 33, 32]


def test_marks_have_names_of_their_own_at_the_ids_of_free_tokens():
    expected = Marks(mask=18, void=19, truth=20, blank=21, sep=22)
    assert marks_of(tokenizer()) == expected
    assert marks_of(load_tokenizer("embedded")) == expected
    assert [CHARACTER_SPECIALS[i] for i in expected.ids] == [
        "<mask>",
        "<void>",
        "<truth>",
        "<blank>",
        "<sep>",
    ]
    assert tokenizer().special_ids == frozenset(range(32))


def test_a_mark_that_is_missing_or_outside_the_vocabulary_is_named():
    lacking = character_tokenizer(count_characters(TEXTS)).replace("<blank>", "<other>")
    with pytest.raises(UserError, match="no token <blank>, nor <SPECIAL_21>"):
        marks_of(Tokenizer(lacking.encode()))
    with pytest.raises(UserError, match=r"model.vocab_size = 20 is too small: .* <truth> as 20"):
        marks_of(tokenizer(), 20)
