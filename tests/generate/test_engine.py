"""Cached decoding against the model's own full pass and against transformers."""

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron.errors import UserError
from nemotron.generate.engine import Engine
from nemotron.generate.forward import append, read
from nemotron.generate.request import Request
from nemotron.generate.sampling import Sampling, choose
from nemotron.model.cache import Cache
from nemotron.model.cached_rows import CachedRows
from nemotron.model.hybrid import HybridLM

GREEDY = Sampling(0.0)
# float32: another order of sums; the largest seen is 1e-6
TOLERANCE = 1e-5


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    return ((ours - other).abs().max() / other.abs().max()).item()


@torch.inference_mode()
def full_logits(model: HybridLM, ids: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([ids])))[0]


@pytest.mark.parametrize("pieces", [[19], [7, 7, 5], [18, 1], [1] * 19])
@torch.inference_mode()
def test_cached_logits_are_those_of_one_pass(model: HybridLM, pieces: list[int]) -> None:
    ids = torch.tensor(random_prompts(19, 19, 19))
    cache = Cache(model.config, 3)
    rows = CachedRows(cache, [cache.admit() for _ in range(3)])
    parts = [model.logits(model(piece, cache=rows)) for piece in ids.split(pieces, dim=1)]
    assert relative(torch.cat(parts, 1), model.logits(model(ids))) <= TOLERANCE


@pytest.mark.parametrize("prefill_tokens", [512, 7, 6, 1])
def test_prompts_of_other_lengths_do_not_matter(model: HybridLM, prefill_tokens: int) -> None:
    # a row that ends at a piece's edge, one inside, a single token, and two of one length apart
    prompts = random_prompts(19, 12, 1, 7, 12)
    rows, logits = read(model, prompts, prefill_tokens)
    further = torch.tensor([[5], [6], [7], [8], [9]])
    after = append(model, rows, further)
    for row, prompt in enumerate(prompts):
        alone = full_logits(model, [*prompt, int(further[row])])
        assert relative(logits[row], alone[-2]) <= TOLERANCE
        assert relative(after[row], alone[-1]) <= TOLERANCE


def test_greedy_tokens_are_the_argmax_of_a_full_pass(model: HybridLM) -> None:
    prompts = random_prompts(9, 4)
    for prompt, new in zip(prompts, Engine(model).generate(prompts, 12, GREEDY), strict=True):
        logits = full_logits(model, prompt + new)
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new


def test_sampled_tokens_are_those_of_a_plain_loop(model: HybridLM) -> None:
    sampling, [prompt] = Sampling(0.9, top_p=0.95, seed=5), random_prompts(9)
    uniforms = torch.rand(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    text = list(prompt)
    for uniform in uniforms:
        logits = full_logits(model, text)[-1:]
        text.append(choose(logits, sampling, uniform[None]).tokens.item())
    assert Engine(model).generate([prompt], 12, sampling) == [text[9:]]


def test_a_row_is_the_same_alone_and_in_a_batch(model: HybridLM) -> None:
    sampling = Sampling(1.0, top_k=20, top_p=0.95, seed=11)
    prompts = random_prompts(9, 4, 13)
    together = Engine(model).generate(prompts, 12, sampling)
    assert [Engine(model).generate([p], 12, sampling)[0] for p in prompts] == together


def test_a_seed_repeats_the_text_and_another_changes_it(model: HybridLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        return Engine(model).generate(random_prompts(9), 20, Sampling(1.0, seed=seed))

    assert sample(3) == sample(3) != sample(4)


def test_a_row_ends_at_its_stop_token_and_the_others_go_on(model: HybridLM) -> None:
    prompts = random_prompts(9, 4)
    free = Engine(model).generate(prompts, 12, GREEDY)
    stop = next(token for token in free[0] if token not in free[1])
    first, second = Engine(model, stop={stop}).generate(prompts, 12, GREEDY)
    assert first == free[0][: free[0].index(stop) + 1]
    assert second == free[1]


def test_the_stream_ends_when_every_row_has_ended(model: HybridLM) -> None:
    prompts = random_prompts(9)
    free = Engine(model).generate(prompts, 12, GREEDY)[0]
    request = Request(prompts[0], 12, GREEDY)
    stopped = list(Engine(model, stop={free[0]}).run([request]))
    assert [event.token for event in stopped] == [free[0]]
    assert stopped[0].finish == "stop"


def test_timing_counts_prompt_and_new_tokens(model: HybridLM) -> None:
    engine = Engine(model)
    engine.generate(random_prompts(9, 4, 1), 5, GREEDY)
    assert (engine.timing.prompt_tokens, engine.timing.new_tokens) == (14, 3 * 5)
    # the first token of each row comes out of the prompt's pass
    assert engine.timing.further_tokens == 3 * 4
    assert engine.timing.prefill_s > 0
    assert engine.timing.decode_s > 0


def test_the_tokens_that_timing_counts_are_those_of_the_answers(model: HybridLM) -> None:
    prompts = random_prompts(9, 4)
    free = Engine(model).generate(prompts, 12, GREEDY)
    for stop in ((), (free[0][3],)):
        for most in (1, 2, 8):
            engine = Engine(model, stop)
            answers = engine.generate(prompts, most, GREEDY)
            assert engine.timing.new_tokens == sum(map(len, answers))
            assert engine.timing.further_tokens == sum(map(len, answers)) - len(answers)
            said = str(engine.timing)
            assert "prompt 13 tokens, " in said
            assert f"; new {sum(map(len, answers))} tokens" in said
            assert said.endswith("tokens/s") == (most > 1)


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 5, "no prompt is given"),
        ([[1], []], 5, "prompt 2 is empty"),
        ([[1, 61]], 5, "prompt 1 has token 61, but the model's vocabulary has 61 tokens"),
        ([[-1]], 5, "prompt 1 has token -1"),
        ([[1]], 0, "max_new_tokens = 0 must be at least 1"),
    ],
)
def test_bad_prompts_are_refused(
    model: HybridLM, prompts: list[list[int]], max_new_tokens: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Engine(model).generate(prompts, max_new_tokens, GREEDY)


@pytest.fixture(scope="module")
def peer(model: HybridLM) -> NemotronHForCausalLM:
    """transformers' model with the same weights and without its floor of the time step."""
    settings = model.config.model_dump(exclude={"time_step_limit"}, exclude_none=True)
    peer = NemotronHForCausalLM(NemotronHConfig(**settings)).eval()
    peer.set_experts_implementation("eager")  # the fast one refuses small odd widths
    state = model.state_dict()
    peer.load_state_dict(
        {n.replace("backbone.", "model."): t for n, t in state.items() if not n.startswith("mtp.")}
    )
    for module in peer.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return peer


def test_prefill_and_decoding_are_those_of_transformers(
    model: HybridLM, peer: NemotronHForCausalLM
) -> None:
    prompts = random_prompts(9, 9)
    theirs = peer.generate(
        torch.tensor(prompts),
        attention_mask=torch.ones(2, 9, dtype=torch.int64),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert Engine(model).generate(prompts, 8, GREEDY) == theirs.sequences[:, 9:].tolist()
    rows, logits = read(model, prompts)
    for step, expected in enumerate(theirs.logits):
        assert relative(logits, expected) <= 2e-5
        logits = append(model, rows, theirs.sequences[:, 9 + step, None])
