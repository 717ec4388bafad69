"""Rules between settings, and between settings and the machine; no torch and no Megatron here.

Each rule yields problems of one line: where, what was expected, what came, what to do.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpgd.config.algorithm import (
    AggregationConfig,
    AlgorithmConfig,
    BalancedClip,
    DriftConfig,
    PromptWeightConfig,
    RejectionConfig,
)
from megatron_cpgd.config.base import Config
from megatron_cpgd.config.messages import did_you_mean
from megatron_cpgd.config.model_folder import check_model_folder
from megatron_cpgd.config.schema import (
    ExactMatchReward,
    ExperimentConfig,
    FormatReward,
    MathReward,
    PythonReward,
)
from megatron_cpgd.config.stability import StabilityConfig

_WITHOUT_CLIP_RANGE = ("capped_weight", "soft_gate", "probability_mask", "sequence_weight")
"""Policy terms that do not read algorithm.clip."""


def check_config(config: ExperimentConfig) -> list[str]:
    """Every problem of a configuration whose single settings are valid; empty if there is none."""
    return [
        *_inert_algorithm(config),
        *_objective(config),
        *_sampler_correction(config),
        *_inert_switches(config),
        *_inert_stability(config),
        *_batch_sizes(config),
        *_evaluations(config),
        *_rewards(config),
        *_paths(config),
        *check_model_folder(config),
        *_world_size(config),
    ]


def check_passthrough(
    given: Mapping[str, Any], allowed: set[str], forbidden: Mapping[str, str], where: str
) -> list[str]:
    """Problems of options that go to another library under its own names.

    Args:
        given: option name -> value, as in `model.megatron` or `rollout.engine_args`.
        allowed: names that the library has.
        forbidden: names that this package sets itself -> the setting to use instead.
        where: dotted path of the section, for the message.
    """
    problems = []
    for name in given:
        if name in forbidden:
            problems.append(f"{where}.{name}: is set by us; use {forbidden[name]} instead")
        elif name not in allowed:
            hint = did_you_mean(name, allowed - forbidden.keys())
            problems.append(f"{where}.{name}: unknown option; {hint}")
    return problems


def _inert_algorithm(config: ExperimentConfig) -> Iterator[str]:
    algorithm = config.algorithm
    drift, weight, aggregation = algorithm.drift, algorithm.prompt_weight, algorithm.aggregation
    reference = algorithm.reference
    if algorithm.mini_batches * algorithm.epochs == 1 and algorithm.old_policy == "trainer":
        yield from _inert_in_one_step(algorithm)
    if weight.type != "clip_filter" and _changed(weight, "max_weight", PromptWeightConfig):
        yield (
            f"algorithm.prompt_weight.max_weight={weight.max_weight} does nothing: it bounds "
            f"`clip_filter`, and algorithm.prompt_weight.type={weight.type}; remove one of them"
        )
    if weight.type == "clip_filter" and algorithm.filter.max_batches is not None:
        yield (
            "algorithm.prompt_weight.type=clip_filter does nothing: it counts groups of equal "
            f"rewards, which algorithm.filter.max_batches={algorithm.filter.max_batches} leaves "
            "out; use equal or std, or max_batches=null"
        )
    if drift.coef == 0 and _changed(drift, "gradient_clip", DriftConfig):
        yield (
            f"algorithm.drift.gradient_clip={drift.gradient_clip} does nothing while "
            "algorithm.drift.coef=0; remove it or set a coef > 0"
        )
    if reference.coef == 0:
        below = AlgorithmConfig.below({"preset": algorithm.preset})["reference"]
        for name in ("estimator", "path"):
            if (value := getattr(reference, name)) != below[name]:
                yield (
                    f"algorithm.reference.{name}={value} does nothing while "
                    "algorithm.reference.coef=0; remove it or set a coef > 0"
                )
    summed = aggregation.type == "sequence_sum_over_length"
    if not summed and _changed(aggregation, "length", AggregationConfig):
        yield (
            f"algorithm.aggregation.length={aggregation.length} does nothing: it divides "
            f"`sequence_sum_over_length`, and algorithm.aggregation.type={aggregation.type}; "
            "remove one of them"
        )
    if algorithm.clip.type != "none" and algorithm.policy.type in _WITHOUT_CLIP_RANGE:
        yield (
            f"algorithm.clip does nothing: algorithm.policy.type={algorithm.policy.type} has no "
            "clip range, its bounds are settings of its own; set algorithm.clip={type: none}"
        )


def _inert_in_one_step(algorithm: AlgorithmConfig) -> Iterator[str]:
    """With a single optimizer step pi_theta is pi_old, and every term is plain policy gradient."""
    clips, drifts = algorithm.clip.type != "none", algorithm.drift.coef > 0
    shaped = algorithm.policy.type != "log_ratio" and not algorithm.reads_rollout_logprobs
    if not (clips or drifts or shaped):
        return
    switches = (
        ("clip", "clip={type: none}", clips),
        ("drift", "drift.coef=0", drifts),
        (f"policy.type={algorithm.policy.type}", "policy={type: log_ratio}", shaped),
    )
    named = [f"algorithm.{name}" for name, _, on in switches if on]
    off = [f"algorithm.{setting}" for _, setting, on in switches if on]
    yield (
        f"{' and '.join(named)} {'do' if len(named) > 1 else 'does'} nothing: with one "
        "optimizer step per rollout the log-ratio is zero by construction; set "
        f"algorithm.mini_batches > 1 or algorithm.epochs > 1, or {' and '.join(off)}"
    )


def _objective(config: ExperimentConfig) -> Iterator[str]:
    """What an objective needs and cannot get, and what does not go together."""
    algorithm, rollout = config.algorithm, config.rollout
    policy = algorithm.policy.type
    if algorithm.epochs > 1 and policy == "log_ratio" and algorithm.clip.type == "none":
        yield (
            f"algorithm.epochs={algorithm.epochs}: passes after the first are weighted by the "
            "ratio truncated to the clip range, which algorithm.clip={type: none} does not have; "
            "set a clip or algorithm.epochs=1"
        )
    if policy == "sequence_ratio" and algorithm.clip.type == "tight_to_loose":
        yield (
            "algorithm.clip={type: tight_to_loose} has a range for each token, but "
            "algorithm.policy.type=sequence_ratio clips one ratio per response; use "
            "{type: constant}"
        )
    if isinstance(algorithm.clip, BalancedClip):
        yield from _balanced_clip(algorithm.clip, policy)
    buffer = algorithm.advantage.overlong_buffer_tokens
    if buffer is not None and buffer > rollout.max_response_tokens:
        yield (
            f"algorithm.advantage.overlong_buffer_tokens={buffer} must be <= "
            f"rollout.max_response_tokens={rollout.max_response_tokens}"
        )


def _balanced_clip(clip: BalancedClip, policy: str) -> Iterator[str]:
    if policy != "ratio" and policy not in _WITHOUT_CLIP_RANGE:
        yield (
            "algorithm.clip={type: balanced} balances the policy term `ratio`, but "
            f"algorithm.policy.type={policy}; set algorithm.policy={{type: ratio}} or another clip"
        )
    for side in ("low", "high"):
        start, end = getattr(clip, f"{side}_start"), getattr(clip, f"{side}_end")
        step = getattr(clip, f"{side}_step")
        if (end - start) / step + 1e-6 < 1:
            yield (
                f"algorithm.clip.{side}_start={start} and .{side}_end={end} leave no room for one "
                f"{side}_step={step}; set {side}_end >= {side}_start + {side}_step"
            )


def _sampler_correction(config: ExperimentConfig) -> Iterator[str]:
    algorithm, rollout = config.algorithm, config.rollout
    corrects = algorithm.correction.type != "none"
    own = algorithm.policy.type == "joint_weight" or (
        getattr(algorithm.policy, "anchor", "old") == "rollout"
    )
    rejects = algorithm.rejection != RejectionConfig()
    yield from _sampler_is_old(config)
    if corrects and own:
        yield (
            f"algorithm.correction={{type: {algorithm.correction.type}}} counts the difference to "
            f"the sampler twice: algorithm.policy.type={algorithm.policy.type} already has "
            "pi_theta / sampler in its weight; set algorithm.correction={type: none}"
        )
    anchored = algorithm.old_policy == "sampler"
    if (corrects or own or rejects or anchored) and (rollout.top_p < 1 or rollout.top_k != -1):
        named = (
            "old_policy=sampler" if anchored
            else "policy" if own
            else "correction" if corrects
            else "rejection"
        )  # fmt: skip
        yield (
            f"algorithm.{named} divides by the sampler's probabilities, but rollout.top_p="
            f"{rollout.top_p} and rollout.top_k={rollout.top_k} truncate its distribution and not "
            "the trainer's; set top_p=1 and top_k=-1"
        )


def _sampler_is_old(config: ExperimentConfig) -> Iterator[str]:
    """With pi_old = mu the ratio between them is 1, and whatever looks at it does nothing."""
    algorithm = config.algorithm
    if algorithm.old_policy != "sampler":
        return
    rejection = algorithm.rejection
    switches = {
        "algorithm.correction": algorithm.correction.type != "none",
        "algorithm.rejection.geometric_low": rejection.geometric_low is not None,
        "algorithm.rejection.geometric_high": rejection.geometric_high is not None,
        "algorithm.rejection.veto": rejection.veto is not None,
        "rollout.logprob_diff_limit": config.rollout.logprob_diff_limit is not None,
    }
    for name, on in switches.items():
        if on:
            yield (
                f"{name} compares the trainer's old log-probs with the sampler's, but "
                "algorithm.old_policy=sampler takes the sampler's for both; remove it or set "
                "algorithm.old_policy=trainer"
            )


def _inert_switches(config: ExperimentConfig) -> Iterator[str]:
    rollout, optim, parallel = config.rollout, config.optim, config.parallel
    if rollout.logprob_diff_limit is not None and (rollout.top_p < 1 or rollout.top_k != -1):
        yield (
            f"rollout.logprob_diff_limit={rollout.logprob_diff_limit} compares full distributions, "
            f"but rollout.top_p={rollout.top_p} and rollout.top_k={rollout.top_k} truncate the "
            "engine's; set top_p=1 and top_k=-1, or logprob_diff_limit=null"
        )
    if rollout.logprob_diff_limit is not None and rollout.staleness > 0:
        yield (
            f"rollout.logprob_diff_limit={rollout.logprob_diff_limit} expects trainer and engine "
            f"to hold the same weights, but rollout.staleness={rollout.staleness} compares "
            "different ones; set logprob_diff_limit=null or staleness=0"
        )
    if parallel.vpp > 1 and parallel.pp == 1:
        yield (
            f"parallel.vpp={parallel.vpp} needs a pipeline, but parallel.pp=1; "
            "set parallel.pp > 1 or parallel.vpp=1"
        )
    if optim.schedule == "constant" and optim.min_lr > 0:
        yield (
            f"optim.min_lr={optim.min_lr} does nothing: optim.schedule=constant never decays; "
            "set schedule=linear or cosine, or min_lr=0"
        )
    elif optim.min_lr > optim.lr:
        yield f"optim.min_lr={optim.min_lr} must be <= optim.lr={optim.lr}"
    if config.data.system_prompt is not None and not config.data.chat_template:
        yield (
            "data.system_prompt does nothing: data.chat_template=false feeds prompts as they are; "
            "put the text into the prompts or set chat_template=true"
        )


def _inert_stability(config: ExperimentConfig) -> Iterator[str]:
    stability = config.stability
    set_mismatch = stability.mismatch is not None and _changed(
        stability, "mismatch", StabilityConfig
    )
    if config.algorithm.old_policy == "sampler" and set_mismatch:
        yield (
            f"stability.mismatch={stability.mismatch} does nothing: rollout/kl_k3 compares the "
            "trainer's old log-probs with the engine's, and algorithm.old_policy=sampler computes "
            "none; remove one of them"
        )
    inert = {"max_roll_backs", "lr_factor"} if stability.action != "roll_back" else set()
    if stability.action == "off":
        inert = StabilityConfig.model_fields.keys() - {"action", "not_finite"}
    for name in sorted(inert):
        if _changed(stability, name, StabilityConfig):
            yield (
                f"stability.{name}={getattr(stability, name)} does nothing while "
                f"stability.action={stability.action}; remove one of them"
            )


def _batch_sizes(config: ExperimentConfig) -> Iterator[str]:
    rollout, mini_batches = config.rollout, config.algorithm.mini_batches
    if mini_batches > rollout.prompts_per_step:
        yield (
            f"algorithm.mini_batches={mini_batches} must be <= "
            f"rollout.prompts_per_step={rollout.prompts_per_step}: a mini-batch holds whole groups"
        )
    compares = (
        config.algorithm.advantage.baseline != "none"
        or config.algorithm.prompt_weight.type != "equal"
    )
    if rollout.samples_per_prompt < 2 and compares:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt} must be >= 2: an advantage "
            "is centred in its group, so a single response always has advantage 0"
        )
    elif rollout.samples_per_prompt < 2 and config.algorithm.filter.max_batches is not None:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt} must be >= 2: "
            f"algorithm.filter.max_batches={config.algorithm.filter.max_batches} keeps groups of "
            "unequal rewards, and a single response has no unequal one; or set max_batches=null"
        )
    if rollout.prompts_per_step < 2 and config.algorithm.prompt_weight.type == "clip_filter":
        yield (
            f"rollout.prompts_per_step={rollout.prompts_per_step}: algorithm.prompt_weight.type="
            "clip_filter compares the prompts of a batch and is always 1 for a single one; sample "
            "more prompts or use equal"
        )


def _evaluations(config: ExperimentConfig) -> Iterator[str]:
    for name, each in config.eval.sets.items():
        if each.temperature == 0 and each.samples_per_prompt > 1:
            yield (
                f"eval.sets.{name}: temperature=0 gives {each.samples_per_prompt} equal responses; "
                "set samples_per_prompt=1 or a temperature"
            )


def _rewards(config: ExperimentConfig) -> Iterator[str]:
    for index, reward in enumerate(config.rewards.functions):
        where = f"rewards.functions.{index}"
        match reward:
            case MathReward() | ExactMatchReward() if config.data.answer_key is None:
                yield (
                    f"{where}: type {reward.type} needs the ground truth, but "
                    "data.answer_key=null; name the column"
                )
            case FormatReward():
                try:
                    re.compile(reward.pattern)
                except re.error as error:
                    yield f"{where}.pattern: not a regular expression: {error}"
            case PythonReward() if not re.fullmatch(r"\w+(\.\w+)+", reward.path):
                yield f"{where}.path: must be `package.module.function`, got {reward.path!r}"


def _paths(config: ExperimentConfig) -> Iterator[str]:
    data = {"data.path": config.data.path}
    data |= {f"eval.sets.{name}.path": held_out.path for name, held_out in config.eval.sets.items()}
    for where, path in data.items():
        if not path.exists():
            yield f"{where}={path}: no such file or folder, seen from {Path.cwd()}"
        elif path.is_file() and path.suffix not in (".jsonl", ".parquet"):
            yield (
                f"{where}={path}: must be a .jsonl or .parquet file, or a folder written by "
                "`datasets.Dataset.save_to_disk`"
            )
    if config.run.dir.exists() and not config.run.dir.is_dir():
        yield f"run.dir={config.run.dir}: must be a folder, but is a file"


def _world_size(config: ExperimentConfig) -> Iterator[str]:
    processes, sizes = os.environ.get("WORLD_SIZE"), config.parallel
    if processes is not None and processes != str(sizes.world_size):
        yield (
            f"parallel.tp={sizes.tp} * pp={sizes.pp} * cp={sizes.cp} * dp={sizes.dp} = "
            f"{sizes.world_size}, but WORLD_SIZE={processes} processes were started; "
            "set parallel.* or start as many"
        )


def _changed(section: Config, name: str, kind: type[Config]) -> bool:
    # By value, not by `model_fields_set`: the saved config.yaml spells out every default.
    return bool(getattr(section, name) != kind.model_fields[name].default)
