"""Rules of the section `algorithm`: what its settings need, and what would do nothing."""

from collections.abc import Iterator

from megatron_cpgd.config.algorithm import AlgorithmConfig, BalancedClip, RejectionConfig
from megatron_cpgd.config.schema import ExperimentConfig

_WITHOUT_CLIP_RANGE = ("capped_weight", "soft_gate", "probability_mask", "sequence_weight")
"""Policy terms that do not read algorithm.clip."""
CUDA_GRAPHS = ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph")
"""Options of Megatron-Core that capture the layers."""


def check_algorithm(config: ExperimentConfig) -> Iterator[str]:
    """Problems of the objective."""
    yield from _inert_algorithm(config)
    yield from _objective(config)
    yield from _sampler_correction(config)
    yield from _routing_replay(config)


def _inert_algorithm(config: ExperimentConfig) -> Iterator[str]:
    algorithm = config.algorithm
    drift, weight, aggregation = algorithm.drift, algorithm.prompt_weight, algorithm.aggregation
    reference = algorithm.reference
    if algorithm.mini_batches * algorithm.epochs == 1 and algorithm.old_policy == "trainer":
        yield from _inert_in_one_step(algorithm)
    if weight.type != "clip_filter" and weight.changes("max_weight"):
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
    if drift.coef == 0 and drift.changes("gradient_clip"):
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
    if not summed and aggregation.changes("length"):
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


def _routing_replay(config: ExperimentConfig) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.routing_replay == "old_policy" and algorithm.old_policy == "sampler":
        yield (
            "algorithm.routing_replay=old_policy replays the pass that computes old log-probs, "
            "which algorithm.old_policy=sampler leaves out; set old_policy=trainer or "
            "routing_replay=rollout"
        )
    elif (
        algorithm.routing_replay == "old_policy" and algorithm.mini_batches * algorithm.epochs == 1
    ):
        yield (
            "algorithm.routing_replay=old_policy does nothing: with one optimizer step per rollout "
            "the routers still choose as in the old policy; set algorithm.mini_batches > 1 or "
            "algorithm.epochs > 1, or routing_replay=none"
        )
    yield from _unroutable(config)


def _unroutable(config: ExperimentConfig) -> Iterator[str]:
    """Options under which the routers ask nobody where to send a token."""
    users = {
        "algorithm.routing_replay=none": config.algorithm.routing_replay != "none",
        "tracking.routing_every=null": config.tracking.routing_every is not None,
    }
    off = " and ".join(setting for setting, on in users.items() if on)
    options = config.model.megatron
    # The first chooses inside its kernel, the others repeat the choice of the captured pass.
    for name in ("moe_router_fusion", *CUDA_GRAPHS):
        if off and options.get(name) not in (None, False, "none"):
            yield (
                f"model.megatron.{name}={options[name]} cannot replay or compare routes; remove it "
                f"or set {off}"
            )
