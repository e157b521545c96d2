import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.corpus import EMBEDDED
from nemotron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron.errors import UserError

TOKENIZER = load_tokenizer("embedded")
TEXT = st.one_of(
    st.text(),
    st.text(alphabet="ab \n\t\r:(_)019é→🙂\u2028\x00"),
    st.lists(st.sampled_from(["</s>", "<think>", " self", "def f(x):\n    ", "naïve"])).map(
        "".join
    ),
)


@given(TEXT)
def test_text_comes_back_exactly(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(TEXT)
def test_byte_counts_add_up_to_the_bytes_of_the_text(text: str):
    ids = np.array(TOKENIZER.encode(text), dtype=np.int64)
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())


@given(TEXT)
def test_text_never_becomes_a_special_token(text: str):
    assert all(index >= 32 for index in TOKENIZER.encode(text))


def test_special_tokens_have_the_ids_of_nemotron():
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    names += ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert [TOKENIZER.id(name) for name in names] == [0, 1, 2, *range(10, 18)]
    assert [TOKENIZER.id(f"<SPECIAL_{i}>") for i in (3, 9, 18, 31)] == [3, 9, 18, 31]
    assert TOKENIZER.vocab_size == 4096
    assert TOKENIZER.token_bytes[:32].tolist() == [0] * 32


def test_special_tokens_are_read_only_when_asked_for():
    ids = TOKENIZER.encode("<think>no</think></s>", specials=True)
    assert (ids[0], ids[-2:]) == (12, [13, 2])
    assert TOKENIZER.decode(ids, skip_specials=True) == "no"
    assert len(TOKENIZER.encode("<think>")) > 1


def test_threads_with_different_settings_share_a_tokenizer():
    text = "a <think> b" * 20
    expected = {specials: TOKENIZER.encode(text, specials=specials) for specials in (False, True)}

    def encode_often(specials: bool) -> bool:
        return all(
            TOKENIZER.encode(text, specials=specials) == expected[specials] for _ in range(300)
        )

    assert expected[False] != expected[True]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(encode_often, [False, True, False, True]))


def test_transformers_reads_the_file_alike():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED / "tokenizer.json"))
    text = "def f(x):\n    return x**2  # naïve\n\nThou art 1600 years old. 🙂"
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text)
    assert theirs.decode(TOKENIZER.encode(text), clean_up_tokenization_spaces=False) == text


def test_a_sentencepiece_like_tokenizer_is_counted_in_bytes_too():
    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "é": 4, "▁a": 5}
    vocabulary |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    model = tokenizers.models.BPE(vocabulary, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    made.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(made.to_str().encode())
    text = "a aé 🙂"
    ids = np.array([*tokenizer.encode(text), tokenizer.id("</s>")])
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_tokenizer_that_cuts_and_fills_is_used_whole(tmp_path: Path):
    made = tokenizers.Tokenizer.from_str((EMBEDDED / "tokenizer.json").read_text())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    assert load_tokenizer(str(tmp_path)).encode(text) == TOKENIZER.encode(text)


def test_saving_keeps_every_byte(tmp_path: Path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).hash == TOKENIZER.hash


def test_what_is_no_tokenizer_is_named(tmp_path: Path):
    missing, broken = tmp_path / "missing.json", tmp_path / "broken.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(UserError, match=rf"{missing} does not exist; give the path"):
        load_tokenizer(str(missing))
    with pytest.raises(UserError, match=rf"{broken} is not a tokenizer.json: "):
        load_tokenizer(str(broken))
    with pytest.raises(UserError, match=r"no token '<eot>'"):
        TOKENIZER.id("<eot>")


def changed(**steps: object) -> bytes:
    """Return the embedded tokenizer with other steps."""
    return json.dumps(json.loads(TOKENIZER.content) | steps).encode()


def test_replacements_that_let_a_text_explode_are_refused():
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    beside = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a" * 80}
    for steps, name in (
        ({"normalizer": {"type": "Sequence", "normalizers": [double] * 40}}, "normalizer"),
        ({"decoder": {"type": "Sequence", "decoders": [double] * 7}}, "decoder"),
        ({"normalizer": beside}, "normalizer"),
    ):
        with pytest.raises(ValueError, match=f"its {name} makes a text .* times as long"):
            Tokenizer(changed(**steps))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [space, double, {"type": "NFKC"}]
    Tokenizer(changed(normalizer={"type": "Sequence", "normalizers": steps}))


def test_a_token_of_absurd_length_is_refused():
    layout = json.loads(TOKENIZER.content)
    layout["model"]["vocab"]["a" * 70_000] = len(layout["model"]["vocab"])
    with pytest.raises(ValueError, match="a token has 70000 characters"):
        Tokenizer(json.dumps(layout).encode())


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "null"},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "null"},
        {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "null"}
        | {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None},
    ],
    ids=["bpe", "word level", "word piece", "unigram"],
)
def test_an_unknown_word_without_a_token_for_it_is_a_mistake_of_the_tokenizer(model):
    poor = Tokenizer(changed(model=model, pre_tokenizer=None, added_tokens=[]))
    assert poor.encode("a") == [0]
    for encode in (poor.encode, poor.encode_offsets):
        with pytest.raises(UserError, match=r"the tokenizer fails on a text: .*; use another one"):
            encode("b")


@pytest.mark.parametrize("merges", [[["a", "é"]], ["a é"], [["a", "##b"], ["a", "b"]], [[]], [3]])
def test_a_merge_without_the_prefix_of_its_model_ends_no_process(merges):
    vocabulary = {"a": 0, "b": 1, "##b": 2, "ab": 3, "é": 4, "aé": 5}
    model = {"type": "BPE", "vocab": vocabulary, "continuing_subword_prefix": "##"}
    assert Tokenizer(changed(model=model | {"merges": [["a", "##b"]]}, added_tokens=[]))
    with pytest.raises(ValueError, match="does not go on with continuing_subword_prefix '##'"):
        Tokenizer(changed(model=model | {"merges": merges}, added_tokens=[]))


def test_a_tokenizer_with_two_meanings_is_refused():
    twice = TOKENIZER.content.replace(b'"model"', b'"model": {}, "model"', 1)
    with pytest.raises(ValueError, match="a key is given twice"):
        Tokenizer(twice)
    for content, said in ((b"[]", "it is not a mapping"), (b"[" * 99_999, "nested too deep")):
        with pytest.raises(ValueError, match=said):
            Tokenizer(content)


def test_an_expression_without_end_is_a_mistake_of_the_tokenizer():
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    endless = Tokenizer(changed(pre_tokenizer=pattern | {"invert": False}))
    with pytest.raises(UserError, match=r"the tokenizer fails on a text: .*retry-limit"):
        endless.encode("a" * 60 + "!")
