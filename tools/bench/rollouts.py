"""Measure rollouts: answers of a small model, beside transformers' `generate` and TRL's GRPO.

python tools/bench/rollouts.py recipes/tiny/arith/rl.yaml runs/arith-base runs/arith-base/export

The recipe says how many answers are sampled, and how. MODEL is a run, EXPORT its weights for
transformers. All ways take turns; the least processor seconds of several rounds count. Whoever
has `trl` sees whole rollout batches of its GRPOTrainer as well: answers, rewards and updates, as
many of each as ours.
"""

import argparse
import importlib.util
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from nemotron.generate.sampling import Sampling
from nemotron.loading import load, read_initial
from nemotron.parallel.runtime import Ranks
from nemotron.posttrain.answering import Answerer, Asked
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.rollout import answering
from nemotron.posttrain.stage import Reinforcement
from nemotron.posttrain.tasks import Tasks
from nemotron.recipe.load import load_recipe
from nemotron.train.initial import load_initial


def main() -> None:
    """Print tokens per second of the processor of each way, and their ratio to ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model")
    parser.add_argument("export", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="rollout batches of TRL")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = load_recipe(given.recipe, []).config
    assert isinstance(config, RlConfig)
    ways = {
        "nemotron": ours(config, given.model),
        "transformers generate": generate(config, given.export),
    }
    speeds = dict.fromkeys(ways, 0.0)
    for _ in range(given.rounds):
        for name, way in ways.items():
            speeds[name] = max(speeds[name], speed(way))
    for name, value in speeds.items():
        ratio = speeds["nemotron"] / value
        print(f"{name:<22} {value:8,.0f} sampled tokens per CPU second; ours is {ratio:.2f} times")
    own = our_step(config, given.model, given.steps)
    print(f"nemotron: {own:.2f} CPU seconds a rollout batch with its updates")
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed; pip install trl shows its GRPO as well")
        return
    other, sampled = grpo_step(config, given.export, given.steps)
    ratio = speeds["nemotron"] / sampled
    print(f"TRL GRPO's answers: {sampled:,.0f} tokens per CPU second; ours is {ratio:.2f} times")
    print(f"TRL GRPO: {other:.2f} CPU seconds a rollout batch with its updates: {other / own:.1f}x")


def speed(way: Callable[[], int]) -> float:
    """Return the tokens per processor second of one call."""
    start = time.process_time()
    tokens = way()
    return tokens / (time.process_time() - start)


def prompts(config: RlConfig) -> list[tuple[int, ...]]:
    """Return the prompts of the first rollout batch that are as long as most, for no padding."""
    found = [task.prompt for task in Tasks(config).batch(0)]
    length = max({len(p) for p in found}, key=[len(p) for p in found].count)
    return [prompt for prompt in found if len(prompt) == length]


def ours(config: RlConfig, place: str) -> Callable[[], int]:
    """Return what samples all answers with our engine, and their number of tokens."""
    tasks, size = Tasks(config), config.rollout.num_generations_per_prompt
    model = load(place).requires_grad_(False)
    at, how = config.rollout.temperature, answering(config.rollout, tasks)
    asked = [Asked(p, Sampling(at, seed=i), size) for i, p in enumerate(prompts(config))]

    def run() -> int:
        # as in a step: the weights are prepared anew for each rollout batch
        return sum(len(a.tokens) for a in Answerer(model, tasks.prompts, how).answer(asked))

    return run


def generate(config: RlConfig, export: Path) -> Callable[[], int]:
    """Return the same with `generate` of transformers, without its log-probabilities."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    tasks, rollout = Tasks(config), config.rollout
    rows = torch.tensor(prompts(config)).repeat_interleave(rollout.num_generations_per_prompt, 0)
    ends = torch.tensor(sorted(tasks.prompts.stop_ids))

    @torch.inference_mode()
    def run() -> int:
        found = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            top_k=0,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            eos_token_id=ends.tolist(),
            pad_token_id=int(ends[0]),
        )
        return num_sampled(found[:, rows.shape[1] :], tasks.prompts.stop_ids)

    return run


def spent() -> float:
    """Return the processor seconds of this process and of those that it has waited for."""
    own = time.process_time()
    return own + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def our_step(config: RlConfig, place: str, steps: int) -> float:
    """Return the processor seconds of a rollout batch with its verdicts and updates."""
    config = config.model_copy(update={"init_from": place})
    stage, device = Reinforcement(), torch.device("cpu")
    setup = stage.build(config, stage.plan(config), device, 1.0, Ranks())
    load_initial(setup.trainer.local, place, read_initial, seed=config.seed)
    start = spent()
    for step in range(steps * config.rollout.updates_per_step):
        setup.trainer.update(step, setup.trainer.batches.take(step))
    setup.close()  # verifiers are processes, which count when they have ended
    return (spent() - start) / steps


def grpo_step(config: RlConfig, export: Path, steps: int) -> tuple[float, float]:
    """Return the processor seconds of a rollout batch of TRL's GRPO, with as many updates.

    Beside them stand the tokens per processor second of its calls of `generate`.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tasks, rollout = Tasks(config), config.rollout
    batch = [task for number in range(steps) for task in tasks.batch(number)]
    rows = [
        {"prompt": tasks.tokenizer.decode(t.prompt), "answer": str(t.row["expected_answer"])}
        for t in batch
    ]
    answers = rollout.num_prompts_per_step * rollout.num_generations_per_prompt

    def reward(completions: list[str], answer: list[str], **others: object) -> list[float]:
        return [float(c.strip() == a) for c, a in zip(completions, answer, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=answers // rollout.updates_per_step,
            steps_per_generation=rollout.updates_per_step,
            num_generations=rollout.num_generations_per_prompt,
            max_completion_length=rollout.max_new_tokens,
            temperature=rollout.temperature,
            max_steps=steps * rollout.updates_per_step,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to=[],
        )
        trainer = GRPOTrainer(
            str(export),
            reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(export, padding_side="left"),
        )
        real, seconds, tokens = trainer.model.generate, 0.0, 0

        def generate(input_ids: torch.Tensor, **others: Any) -> torch.Tensor:
            nonlocal seconds, tokens
            start = time.process_time()
            found = real(input_ids=input_ids, **others)
            seconds += time.process_time() - start
            tokens += num_sampled(found[:, input_ids.shape[1] :], tasks.prompts.stop_ids)
            return found

        trainer.model.generate = generate
        start = time.process_time()
        trainer.train()
        return (time.process_time() - start) / steps, tokens / seconds


def num_sampled(answers: torch.Tensor, stop_ids: Iterable[int]) -> int:
    """Return the tokens of answers up to the first end of each, which counts."""
    is_end = torch.isin(answers, torch.tensor(sorted(stop_ids)))
    ended = is_end.int().cumsum(1)
    return int(((ended == 0) | ((ended == 1) & is_end)).sum())


if __name__ == "__main__":
    main()
