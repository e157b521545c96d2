"""Streaming text: characters of several tokens appear whole, and nothing is lost."""

import itertools
import random

import pytest
import tokenizers

from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.generate.text import StopStrings, TextStream

TEXT = "naïve café — 日本語 🧑‍🔬 Ω≈ç√ plain end"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("embedded")


def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "" in pieces, "the text must have a character of several tokens"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) + stream.close() == TEXT


def test_a_character_left_unfinished_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 🧑")[:-1]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in ids)
    assert text.rstrip() == "ok"
    assert text + stream.close() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\N{REPLACEMENT CHARACTER}")


def test_text_goes_on_after_bytes_that_are_no_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🧑")[:-1] + tokenizer.encode(" fine 日 done")
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token) for token in ids) + stream.close()
    assert text == tokenizer.decode(ids)
    assert text.endswith(" fine 日 done")


def test_words_of_a_metaspace_tokenizer_keep_their_spaces() -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {"<unk>": 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3, ".": 4, "</s>": 5}, "<unk>"
    ))  # fmt: skip
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    spaced = Tokenizer(made.to_str().encode())
    ids = [1, 2, 5, 3, 4, 1, 5, 5, 2]
    stream = TextStream(spaced)
    assert [stream.push(token) for token in ids] == [
        "the", " cat", "", " sat", ".", " the", "", "", " cat",
    ]  # fmt: skip
    assert stream.close() == ""
    after_prompt = TextStream(spaced, [1, 2])
    assert "".join(map(after_prompt.push, [3, 4])) + after_prompt.close() == " sat."


def test_special_tokens_are_not_shown(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, [*tokenizer.encode("end"), tokenizer.id("</s>")])) == "end"


@pytest.mark.parametrize("included", [False, True])
def test_a_stop_string_is_found_however_the_text_is_cut(included: bool) -> None:
    generator = random.Random(0)
    for _ in range(2000):
        stops = tuple(
            "".join(generator.choices("ab", k=generator.randint(1, 4)))
            for _ in range(generator.randint(0, 3))
        )
        text = "".join(generator.choices("abc", k=12))
        ends = sorted(generator.randrange(13) for _ in range(4))
        pieces = list(itertools.pairwise([0, *ends, 12]))
        num_passed = generator.randrange(3)
        passed = pieces[num_passed][0]
        watch, emitted, found = StopStrings(stops, included=included), "", None
        for number, (begin, end) in enumerate(pieces):
            take = watch.pass_over if number < num_passed else watch.push
            emitted += take(text[begin:end])
            if watch.found is not None:
                found = end
                break
        # the shortest beginning of the text that ends with a stop string
        shortest = next(
            (n for n in range(passed + 1, 13) if any(text[:n].endswith(s) for s in stops)), None
        )
        if shortest is None:
            assert watch.found is None
            assert emitted + watch.close() == text
        else:
            # it is found as early as the text allows
            assert found == next(end for _, end in pieces if end >= shortest)
            stop = max((s for s in stops if text[:shortest].endswith(s)), key=len)
            assert watch.found == stop
            assert emitted == text[: shortest if included else shortest - len(stop)]
