"""What the kept checkpoints of a run make of prompts; PyTorch is imported for it."""

from collections.abc import Sequence

from nemotron.checkpoint.manifest import folder_name, steps
from nemotron.errors import UserError
from nemotron.generate.decode_layers import prepare_weights
from nemotron.generate.engine import Engine
from nemotron.generate.request import requests_of
from nemotron.generate.sampling import Sampling
from nemotron.loading import load_with_tokenizer, recipe_ops, stop_ids
from nemotron.report.run import Run
from nemotron.report.samples import Sample, spread

CHECKPOINTS = 4
"""That are asked, the oldest and the newest among them."""


def add_samples(run: Run, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Let checkpoints continue prompts, each token the likeliest one.

    A checkpoint that is damaged, or that its run removes meanwhile, is left out with a sentence.

    Raises:
        UserError: when a prompt is impossible.
    """
    known = sorted(steps(run.files.checkpoints))
    for step in spread(known, CHECKPOINTS):
        path = run.files.checkpoints / folder_name(step)
        try:
            model, tokenizer = load_with_tokenizer(path, ops=recipe_ops(path))
        except UserError as error:
            run.problems.append(str(error))
            continue
        ids = tokenizer.encode_batch(prompts, specials=True)
        requests = requests_of(ids, max_new_tokens, Sampling(temperature=0))
        for number, request in enumerate(requests, 1):
            request.check(model.config.vocab_size, f"prompt {number}")
        ends = {model.config.eos_token_id, *stop_ids(path, model.config)}
        engine = Engine(prepare_weights(model), ends, tokenizer=tokenizer, slots=len(requests))
        answers = dict.fromkeys(range(len(requests)), "")
        for event in engine.run(requests):
            answers[event.request] = event.answer.text
        run.samples += [
            Sample(step, prompt, answers[number], is_continuation=True)
            for number, prompt in enumerate(prompts)
        ]
