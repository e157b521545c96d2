"""Answers that go on with new weights: every token has the probability of those that it names."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron.checkpoint.manifest import FORMAT
from nemotron.cli import run
from nemotron.data.tokenizer import load_tokenizer
from nemotron.generate.engine import Engine
from nemotron.generate.forward import extend, new_cache, score
from nemotron.generate.request import Begun, Request
from nemotron.generate.sampling import Sampling
from nemotron.generate.weights import load_weights
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM
from nemotron.posttrain.answering import Answerer, Answering, Asked
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.metrics import current_error, mean_lag
from nemotron.posttrain.prompts import Prompts
from nemotron.posttrain.rollout import Rollout
from nemotron.recipe.load import load_recipe
from tests.posttrain.test_rl_run import arithmetic, figures, metrics, rollouts, weights
from tests.support.cases import further
from tests.support.models import build
from tests.support.old_checkpoint import seal
from tests.support.rl import rl_values, write_recipe

PROMPT = (5, 3, 60, 1, 17)
LENGTH, BEFORE = 12, 5


def new_model(seed: int = 0) -> HybridLM:
    return build(seed, torch.float32, hybrid_override_pattern="ME*")


def one_pass(model: HybridLM, ids: list[int]) -> list[float]:
    """Return the log-probabilities of all tokens but the first, by one pass of the model."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids])))[0, :-1]
    found = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
    return found.flatten().tolist()


def stepwise(old: HybridLM, new: HybridLM, ids: list[int], first: int) -> list[float]:
    """Return the log-probabilities of the tokens from `first` on, for new weights after old states.

    The old weights read what was read before the exchange, which is all but the newest token.
    """
    cache = new_cache(old, 1)
    rows = CachedRows(cache, [cache.admit(None)])
    found = []
    with torch.no_grad():
        for place, token in enumerate(ids[:-1]):
            cache.extend(rows.slots[0], place + 1)
            model = old if place < first - 1 else new
            hidden = extend(model, rows, torch.tensor([[token]]), only_last=True)
            found.append(score(model, hidden)[0].log_softmax(-1)[ids[place + 1]].item())
    return found[first - 1 :]


def exchanged(keep: bool, samples: int = 3) -> tuple[HybridLM, HybridLM, list[Any]]:
    """Return two models, and answers whose first tokens the first of them gave."""
    old, new = new_model(), new_model(9)
    how = Answering(LENGTH, slots=2, keep_states=keep)
    prompts = Prompts(load_tokenizer("embedded"), frozenset(), is_chat=False)
    model = copy.deepcopy(old)
    answerer = Answerer(model, prompts, how, version=3)
    asked = Asked(PROMPT, Sampling(seed=1), samples, experts=True, pause_at=BEFORE)
    begun = answerer.answer([asked])
    assert all(answer.finish is None and len(answer.tokens) == BEFORE for answer in begun)
    load_weights(model, new.state_dict().items())
    if keep:
        answerer.update(model, 4)
    else:
        answerer = Answerer(model, prompts, how, version=4)
    return (
        old,
        new,
        answerer.answer(
            [
                Asked(PROMPT, Sampling(seed=1 + k), experts=True, begun=Begun.of(answer))
                for k, answer in enumerate(begun)
            ]
        ),
    )


@pytest.mark.parametrize("keep", [False, True])
def test_tokens_have_the_probabilities_of_the_weights_that_they_name(keep: bool) -> None:
    old, new, answers = exchanged(keep)
    for answer in answers:
        assert answer.versions == [(0, 3), (BEFORE, 4)]
        assert answer.finish == "length"
        assert len(answer.tokens) == LENGTH
        ids = [*PROMPT, *answer.tokens]
        first = len(PROMPT) + BEFORE
        before = one_pass(old, ids)[len(PROMPT) - 1 : first - 1]
        assert answer.logprobs[:BEFORE] == pytest.approx(before, abs=1e-4)
        again = one_pass(new, ids)[first - 1 :]
        kept = stepwise(old, new, ids, first)
        # what the other way would give differs visibly
        assert max(abs(a - b) for a, b in zip(again, kept, strict=True)) > 1e-2
        assert answer.logprobs[BEFORE:] == pytest.approx(kept if keep else again, abs=1e-4)


def test_the_random_numbers_of_an_answer_go_on() -> None:
    _, new, answers = exchanged(keep=False)
    for k, answer in enumerate(answers):
        forced = Request(PROMPT, LENGTH, Sampling(seed=1 + k), forced=tuple(answer.tokens[:BEFORE]))
        [expected] = [e.answer for e in Engine(new).run([forced]) if e.finish]
        assert answer.tokens == expected.tokens


def test_experts_are_those_of_the_newest_reading() -> None:
    """Read again, all tokens have those of the new weights; kept states keep the old ones."""
    old, new, read_again = exchanged(keep=False)
    *_, kept = exchanged(keep=True)

    def choices(model: HybridLM, tokens: list[int]) -> torch.Tensor:
        request = Request(PROMPT, LENGTH, forced=tuple(tokens), experts=True)
        [answer] = [e.answer for e in Engine(model).run([request]) if e.finish]
        assert answer.experts is not None
        return answer.experts

    first = len(PROMPT) + BEFORE - 1
    for answer in read_again:
        assert torch.equal(answer.experts, choices(new, answer.tokens))
    for answer in kept:
        assert torch.equal(answer.experts[:first], choices(old, answer.tokens)[:first])
        assert not torch.equal(answer.experts[:first], choices(new, answer.tokens)[:first])


def flying(updates: int, **more: Any) -> dict[str, Any]:
    # a verdict that comes late on a busy machine would be a fault in one of the runs alone
    given = {"lag": 1, "in_flight_weight_updates": True, "verify_timeout_s": 100.0, **more}
    # any text meets some constraints, so that some rewards are not 0
    constraints = [{"name": "if_constraints"}]
    sizes = {"num_prompts_per_step": 12, "updates_per_step": updates}
    return {"environments": constraints, **sizes, **given}


def recipe_of(folder: Path, name: str, updates: int, **more: Any) -> Path:
    values = rl_values(
        rollout=flying(updates, **more),
        data={"seq_len": 255},
        batch={"global_tokens": 36 // updates * 255},
        checkpoint={"every_steps": 1},
        advantage={"baseline": "none", "scale": "none"},
    )
    return write_recipe(folder, name, values)


@pytest.mark.slow
def test_a_run_counts_lag_and_agreement_by_token(tmp_path: Path) -> None:
    """Two updates, and two tokens for each: the first two have the weights of two steps ago."""
    path = recipe_of(tmp_path, "flying", 2, tokens_per_weight_update=2)
    assert run(["train", str(path)]) == 0
    folder = tmp_path / "runs" / "flying"
    config = load_recipe(folder / "recipe.yaml", []).config
    assert isinstance(config, RlConfig)
    answers = [Rollout.of_json(each) for each in rollouts(folder, 2)]
    lags = []
    for answer in answers:
        expected = [min(place // 2, 2) for place in range(len(answer.tokens))]
        assert answer.token_versions == expected
        lags += [2 - version for version in expected]
    [line] = [line for line in metrics(folder, "train") if line["step"] == 3]
    assert line["rl/lag"] == pytest.approx(sum(lags) / len(lags))
    assert 0 < line["rl/lag"] < 2
    # at a rate of 1e-2 two steps change much, but tokens of the newest weights agree
    assert line["rl/token_mult_prob_error_current"] < 1 + 1e-4
    assert line["rl/token_mult_prob_error"] > 1.01
    assert line["rl/token_mult_prob_error_current"] == current_error(answers, 2, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("updates", "stop", "recompute"),
    [further((1, 1, True)), (2, 1, True), further((2, 3, True)), further((2, 1, False))],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, updates: int, stop: int, recompute: bool
) -> None:
    """Answers wait in the checkpoint; with one after each step, kept states end there anyway."""
    more = {"tokens_per_weight_update": 2, "recompute_kv_cache_after_weight_updates": recompute}
    whole, parts = (recipe_of(tmp_path, name, updates, **more) for name in ("whole", "parts"))
    assert run(["train", str(whole)]) == 0
    assert run(["train", str(parts), "--stop-at", str(stop)]) == 75
    own = tmp_path / "runs" / "parts"
    assert run(["train", str(own / "recipe.yaml"), "--resume"]) == 0
    expected = weights(tmp_path / "runs" / "whole")
    for name, tensor in weights(own).items():
        assert torch.equal(tensor, expected[name]), name
    for step in range(0, 4, updates):
        assert rollouts(own, step) == rollouts(tmp_path / "runs" / "whole", step)
    assert figures(own) == figures(tmp_path / "runs" / "whole")
    versions = {tuple(map(tuple, each["versions"])) for each in rollouts(own, 4 - updates)}
    assert any(len(each) == updates + 1 for each in versions)


def test_only_tokens_of_the_newest_weights_count_for_agreement() -> None:
    values = rl_values(rollout=arithmetic())
    config = RlConfig.model_validate({**values, "name": "a", "output": "runs"})
    first = {
        "task": {"environment": "a", "row": {}, "prompt": [1], "level": 0.0},
        "group": 0,
        "tokens": [1, 2, 3],
        "logprobs": [-1.0, 0.0, -1.0],
        "old_logprobs": [-2.0, -5.0, -1.5],
        "forced": [False, True, False],
        "is_truncated": False,
        "version": 4,
        "versions": [[0, 4], [1, 6]],
        "response": {"text": ""},
        "verdict": {"reward": 0.0},
    }
    answers = [Rollout.of_json(first)]
    assert current_error(answers, 6, config) == pytest.approx(torch.tensor(0.5).exp().item())
    assert current_error(answers, 5, config) is None
    assert mean_lag(answers, 6) == 1.0
    assert json.loads(answers[0].as_line())["versions"] == [[0, 4], [1, 6]]
    kept = config.rollout.model_copy(update={"recompute_kv_cache_after_weight_updates": False})
    assert current_error(answers, 6, config.model_copy(update={"rollout": kept})) is None


@pytest.mark.slow
def test_a_damaged_answer_in_a_checkpoint_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = recipe_of(tmp_path, "torn", 2, tokens_per_weight_update=1)
    assert run(["train", str(path), "--stop-at", "1"]) == 75
    checkpoint = tmp_path / "runs" / "torn" / "checkpoints" / "step-00000001"
    state = checkpoint / "state.json"
    saved = json.loads(state.read_text())
    answer = saved["data"]["ahead"]["paused"][0]
    assert len(answer["begun"]["tokens"]) == 1
    answer["begun"]["tokens"] = [4096]
    state.write_text(json.dumps(saved))
    seal(checkpoint, 1, FORMAT)
    capsys.readouterr()
    own = tmp_path / "runs" / "torn" / "recipe.yaml"
    assert run(["train", str(own), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "step 1 are damaged: an id is not in the vocabulary; resume from another" in said
