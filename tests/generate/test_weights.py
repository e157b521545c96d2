"""New weights while answers are written: all or none, with a version for every token."""

import copy

import pytest
import torch

from nemotron.generate.decode_layers import decode_view
from nemotron.generate.engine import Engine
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.weights import WeightMismatch, checksum, load_weights
from nemotron.model.hybrid import HybridLM
from tests.support.models import build

PROMPT = (5, 3, 60, 1, 17)


def new_model(seed: int = 0) -> HybridLM:
    return build(seed, hybrid_override_pattern="ME*")


def test_all_weights_come_or_none() -> None:
    model, sent = new_model(), new_model(9).state_dict()
    before, number = copy.deepcopy(model.state_dict()), checksum(sent)
    names = list(sent)
    wrong = dict(sent)
    wrong[names[3]] = wrong[names[3]] + 1
    longer = dict(sent)
    longer[names[2]] = longer[names[2]][:-1]
    for weights, message in (
        ([(n, sent[n]) for n in names[1:]], f"{names[0]} is missing; send all"),
        ([*sent.items(), ("further", sent[names[0]])], "further is not in the model"),
        ([*sent.items(), (names[0], sent[names[0]])], f"{names[0]} was given twice"),
        (list(longer.items()), f"{names[2]} has shape"),
        (list(wrong.items()), "the checksum of the weights is"),
    ):
        with pytest.raises(WeightMismatch, match=message):
            load_weights(model, weights, number)
        assert all(model.state_dict()[n].equal(t) for n, t in before.items())
    load_weights(model, reversed(list(sent.items())), number)
    assert checksum(model.state_dict()) == number


@pytest.mark.parametrize("pack", [False, True])
def test_answers_go_on_with_the_new_weights_and_say_from_where(pack: bool) -> None:
    trained, target = new_model().float(), new_model(9).float()
    trained.compute_dtype = target.compute_dtype = torch.float32
    engine = Engine(decode_view(trained, pack=pack), prefixes=4)
    request = Request(PROMPT, 12, Sampling(seed=1), num_samples=2)
    number = engine.submit(request)
    events = [event for _ in range(5) for event in engine.step()]
    load_weights(trained, target.state_dict().items())
    engine.update(decode_view(trained, pack=pack), version=3)
    while not engine.is_idle:
        events += engine.step()
    for sample in range(2):
        answer = [e.answer for e in events if (e.request, e.sample) == (number, sample)][-1]
        written = answer.versions[1][0]
        assert answer.versions == [(0, 0), (written, 3)]
        assert 3 <= written <= 5
        old = answer.tokens[:written]
        # the same random numbers go on with another model after the same tokens
        again = Request(PROMPT, 12, Sampling(seed=1 + sample), forced=tuple(old))
        [expected] = [e.answer for e in Engine(target).run([again]) if e.finish]
        assert expected.tokens == answer.tokens
        first = list(Engine(new_model().float()).run([Request(PROMPT, 12, again.sampling)]))
        assert [e.token for e in first][:written] == old


def test_states_can_be_kept_over_an_update() -> None:
    trained, target = new_model(), new_model(9)
    answers = []
    for keep in (False, True):
        model = copy.deepcopy(trained)
        engine = Engine(model)
        engine.submit(Request(PROMPT, 12, Sampling(0.0)))
        events = [event for _ in range(4) for event in engine.step()]
        load_weights(model, target.state_dict().items())
        engine.update(model, 1, keep_states=keep)
        assert bool(engine.scheduler.running) == keep
        while not engine.is_idle:
            events += engine.step()
        answers.append(events[-1].answer.tokens)
    assert answers[0][:4] == answers[1][:4]
    assert answers[0] != answers[1]
