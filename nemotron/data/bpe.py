"""Byte-level BPE: how the embedded tokenizer was trained, and how a user's own is."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

NAMED_SPECIALS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
    14: "<tool_call>",
    15: "</tool_call>",
    16: "<tool_response>",
    17: "</tool_response>",
}
"""Where the tokenizer of Nemotron 3 has them."""
NUM_SPECIALS = 32
SPECIALS = tuple(NAMED_SPECIALS.get(i, f"<SPECIAL_{i}>") for i in range(NUM_SPECIALS))
NUM_BYTES = 256
WORDS = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word with the space or sign before it
        r"\p{N}",  # one digit
        r" ?[^\s\p{L}\p{N}]+(?:\n+[ \t]*)?",  # signs, a line end and the next indentation
        r"\s*\n+[ \t]*",
        r"\s+(?!\S)",  # spaces less the one that belongs to the next word
        r"\s+",
    ]
)
"""What no token crosses."""


def train_bpe(texts: Iterable[str], vocab_size: int, more_specials: Sequence[str] = ()) -> str:
    """Return the `tokenizer.json` of a BPE with these ids at most; the same texts give the same.

    The ids begin with Nemotron 3's special tokens and `more_specials`, then come the bytes. Text
    with few different words gives fewer ids than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIALS, *more_specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=False)
