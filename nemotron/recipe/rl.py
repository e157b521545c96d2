"""Rules of reinforcement-learning recipes across sections. Reads like a list."""

from collections.abc import Iterator

from nemotron.divisors import divisors, nearest
from nemotron.errors import Finding
from nemotron.posttrain.config import RlConfig
from nemotron.recipe.read import Idle
from nemotron.recipe.sft import unknown_parts
from nemotron.train.schedule import build_schedule


def impossible(config: RlConfig) -> Iterator[Finding]:
    """Yield the values that contradict each other."""
    model, data, rollout, policy = config.model, config.data, config.rollout, config.policy
    if data.seq_len > model.max_position_embeddings:
        yield Finding(
            "data.seq_len",
            f"exceeds model.max_position_embeddings = {model.max_position_embeddings}; shorten "
            "the rows or raise that limit.",
            data.seq_len,
        )
    if rollout.num_prompts_per_step % rollout.updates_per_step:
        near = nearest(rollout.updates_per_step, divisors(rollout.num_prompts_per_step))
        yield Finding(
            "rollout.updates_per_step",
            f"does not divide rollout.num_prompts_per_step = {rollout.num_prompts_per_step}; "
            f"the nearest is {near}.",
            rollout.updates_per_step,
        )
    tokens = int(config.rows_per_update) * data.seq_len
    if config.batch.global_tokens != tokens:
        yield Finding(
            "batch.global_tokens",
            f"is not {int(config.rows_per_update)} answers of an update in rows of data.seq_len = "
            f"{data.seq_len}; write {tokens}.",
            config.batch.global_tokens,
        )
    for number, entry in enumerate(rollout.environments):
        if rollout.curriculum is not None and entry.level > rollout.curriculum.max_level:
            yield Finding(
                f"rollout.environments.{number}.level",
                f"is above rollout.curriculum.max_level = {rollout.curriculum.max_level:g}; lower "
                "it, or raise that limit.",
                entry.level,
            )
    if rollout.lag and policy.correction.kind == "none":
        yield Finding(
            "rollout.lag",
            "answers with older weights, which policy.correction.kind = none does not weigh; use "
            "tis, or 0.",
            rollout.lag,
        )
    if rollout.in_flight_weight_updates and not rollout.lag:
        yield Finding(
            "rollout.in_flight_weight_updates",
            "replaces the weights of answers that are written ahead, but with rollout.lag = 0 none "
            "are; use lag: 1, or false.",
            rollout.in_flight_weight_updates,
        )
    if policy.on_policy and rollout.updates_per_step > 1:
        yield Finding(
            "policy.on_policy",
            "holds for one update on each rollout batch, but rollout.updates_per_step = "
            f"{rollout.updates_per_step}; remove one of them.",
            policy.on_policy,
        )
    if policy.kl_coefficient and config.init_from is None:
        yield Finding(
            "policy.kl_coefficient",
            "compares with the weights of init_from, which is absent; name a model, or use 0.",
            policy.kl_coefficient,
        )
    if config.teacher is not None and policy.kind == "gspo":
        yield Finding(
            "policy.kind",
            "has one ratio for each answer, but a teacher judges tokens; use ppo, cispo or "
            "reinforce.",
            policy.kind,
        )
    closed = (rollout.reasoning_budget or 0) + rollout.reasoning_grace
    if rollout.reasoning_budget is not None and closed >= rollout.max_new_tokens:
        yield Finding(
            "rollout.reasoning_budget",
            "and reasoning_grace leave no token of rollout.max_new_tokens = "
            f"{rollout.max_new_tokens} for the answer; lower them.",
            rollout.reasoning_budget,
        )
    mixes = "E" in model.hybrid_override_pattern
    if rollout.router_replay and mixes and model.language_experts is not None:
        yield Finding(
            "rollout.router_replay",
            "replays the choices of routers, but with model.language_experts a gate makes them; "
            "use false.",
            rollout.router_replay,
        )
    yield from unknown_parts(config.model, config.tune)
    if config.tune.adapter is not None:
        yield Finding(
            "tune.adapter", "is not rolled out yet; leave it out, or fine-tune with stage: sft."
        )
    if config.precision.quantizes:
        yield Finding(
            "precision.preset",
            "quantizes layers, with which rollouts are not made yet; use none.",
            config.precision.preset,
        )
    for axis in ("pp", "cp", "tp"):
        if (size := getattr(config.parallel, axis)) != 1:
            yield Finding(
                f"parallel.{axis}",
                "cannot score rollouts yet; share the weights by dp_shard or ep, and use 1.",
                size,
            )


def idle(config: RlConfig) -> Iterator[Idle]:
    """Yield keys that nothing reads, and why.

    Raises:
        UserError: when the schedule is impossible.
    """
    build_schedule(config.schedule, config.batch.global_tokens)
    model, text = config.model, "the text of this stage is written by the model"
    read = ("tokenizer", "eod_token", "seq_len", "reset_documents", "cache")
    yield Idle([f"data.{n}" for n in type(config.data).model_fields if n not in read], True, text)
    layers = model.hybrid_override_pattern + model.mtp_pattern
    yield Idle(["loss.moe_aux_loss_coeff"], "E" not in layers, "the pattern has no E layer")
    replay = "the backbone has no E layer"
    mixes = "E" in model.hybrid_override_pattern
    yield Idle(["rollout.router_replay"], not mixes, replay)
    ahead = [f"loss.{name}" for name in type(config.loss).model_fields if name.startswith("mtp_")]
    yield Idle(ahead, not model.mtp_pattern, "model.num_nextn_predict_layers = 0")
    unrolled = [key for key in ahead if key != "loss.mtp_num_depths"]
    yield Idle(unrolled, not config.loss.mtp_num_depths, "loss.mtp_num_depths = 0")
    fields = [f"advantage.{name}" for name in type(config.advantage).model_fields]
    yield Idle(fields, config.teacher is not None, "the teacher gives every token its advantage")
    clip = ["policy.clip_low", "policy.clip_high", "policy.dual_clip"]
    one = config.rollout.updates_per_step == 1
    yield Idle(clip, one, "rollout.updates_per_step = 1, so that no ratio differs from 1")
    rollout = config.rollout
    budget = ["rollout.reasoning_budget", "rollout.reasoning_grace"]
    thinking = ["rollout.enable_thinking", *budget]
    yield Idle(thinking, rollout.prompt == "text", "rollout.prompt = text")
    yield Idle(budget, not rollout.enable_thinking, "rollout.enable_thinking = false")
    yield Idle(["policy.kl_kind"], not config.policy.kl_coefficient, "policy.kl_coefficient = 0")
    in_flight = ["tokens_per_weight_update", "recompute_kv_cache_after_weight_updates"]
    stays = "rollout.in_flight_weight_updates = false"
    yield Idle([f"rollout.{n}" for n in in_flight], not rollout.in_flight_weight_updates, stays)
    unlimited = rollout.reasoning_budget is None
    yield Idle(["rollout.reasoning_grace"], unlimited, "rollout.reasoning_budget is absent")
    yield Idle(["evaluation.tokens"], True, "rollout.evaluation_tasks says how much is evaluated")
