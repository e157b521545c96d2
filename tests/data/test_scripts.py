"""The language of tokens by the script of their letters."""

from nemotron.data.correct.characters import character_tokenizer, count_characters
from nemotron.data.scripts import languages_by_script
from nemotron.data.tokenizer import Tokenizer, load_tokenizer


def test_letters_say_the_language_and_nothing_else_does() -> None:
    tokenizer = Tokenizer(character_tokenizer(count_characters(["我aZé5，。д "])).encode())
    found = languages_by_script(tokenizer, ["en", "yue"])
    named = {tokenizer.decode([i]): int(found[i]) for i in range(tokenizer.vocab_size)}
    expected = {"我": 1, "a": 0, "Z": 0, "é": 0, "5": -1, "，": -1, "。": -1, "д": -1, " ": -1}
    assert {text: named[text] for text in expected} == expected
    assert all(found[i] == -1 for i in tokenizer.special_ids)


def test_words_of_a_byte_level_tokenizer_have_a_language() -> None:
    tokenizer = load_tokenizer("embedded")
    found = languages_by_script(tokenizer, ["yue", "en"])
    [*ids] = tokenizer.encode(" the river, 12")
    texts = {tokenizer.decode([i]).strip(): int(found[i]) for i in ids}
    assert texts["the"] == 1
    assert texts[","] == -1
