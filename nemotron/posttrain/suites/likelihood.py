"""The option of a question that a model finds likeliest, without generating anything."""

from collections.abc import Sequence

from nemotron.generate.branches import Scored
from nemotron.generate.scoring import Scorer
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.answering import Answerer
from nemotron.posttrain.environments.base import Response, Row, Verdict, find_field
from nemotron.posttrain.environments.mcqa import options_of
from nemotron.posttrain.suites.samples import Sample


def likeliest(answerer: Answerer, task: str, number: int, row: Row) -> Sample:
    """Return the letter of the option whose text is the likeliest answer, with its verdict.

    `components` hold whether it is right by the sum of the log-probabilities (the reward), and by
    that sum for each byte, as `acc` and `acc_norm` of lm-evaluation-harness. Question and option
    are plain text, also for a chat model. A row passes the model by itself.
    """
    options, wanted = options_of(row), str(find_field(row, "expected_answer")).strip().upper()
    encode = answerer.prompts.tokenizer.encode
    context = encode(f"Question: {find_field(row, 'question')}\nAnswer:", specials=False)
    texts = [f" {text}" for text in options.values()]
    scores = sum_logprobs(answerer.model, context, [encode(t, specials=False) for t in texts])
    by_sum = dict(zip(options, scores, strict=True))
    by_byte = {
        letter: score / len(text.encode())
        for (letter, score), text in zip(by_sum.items(), texts, strict=True)
    }
    first = max(by_sum, key=lambda letter: by_sum[letter])
    each_byte = max(by_byte, key=lambda letter: by_byte[letter])
    verdict = Verdict(
        float(first == wanted),
        {"acc": float(first == wanted), "acc_norm": float(each_byte == wanted)},
        extracted=first,
    )
    return Sample(task, number, 0, row, Response(options[first]), verdict, 0, is_truncated=False)


def sum_logprobs(
    model: HybridLM, context: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """Return the log-probability of each text after the same context, in nats."""
    texts = [Scored((*context, *each), len(context)) for each in continuations]
    return [score.logprob for score in Scorer(model, len(texts)).score(texts)]
