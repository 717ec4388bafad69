"""The training loop, top to bottom: follow one batch downwards from `train`."""

from typing import Any

import torch

from megatron_cpgd.algorithm.coefficients import split_mini_batches
from megatron_cpgd.algorithm.correction import correction_metrics
from megatron_cpgd.algorithm.loss_sequences import (
    bears_loss,
    build_loss_sequences,
    has_epoch_weights,
    mask_metrics,
    old_logprobs,
    old_minus_rollout,
    searched_clip,
    set_epoch_weights,
    without_loss,
)
from megatron_cpgd.algorithm.mismatch import compute_mismatch
from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.algorithm.reference_kl import reference_metrics
from megatron_cpgd.config.algorithm import AlgorithmConfig, BalancedClip
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.guard import ROLLED_BACK_TO, guard
from megatron_cpgd.planning.outcome import predicted_and_measured
from megatron_cpgd.policy.policy import StepResult
from megatron_cpgd.policy.routing_gap import RoutedPass, measure_routing_gap, rollout_routes
from megatron_cpgd.policy.share import share_sequences
from megatron_cpgd.preemption import finish_sampling, next_batch, stop_behind
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.run import (
    Run,
    export,
    log_step,
    note_skipped,
    publish,
    save,
    start_run,
    take_gpus,
)
from megatron_cpgd.scored_batch import ScoredBatch, batch_metrics, train_sequences
from megatron_cpgd.stop_request import StopRequest
from megatron_cpgd.tracking.report import print_report
from megatron_cpgd.tracking.rollout_log import write_rollouts
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import TrainSequence
from megatron_cpgd.weight_sync.sync import sync_weights


def train(
    config: ExperimentConfig,
    engine: RolloutEngine | None = None,
    stop: StopRequest | None = None,
) -> None:
    """Train until run.steps, from where run.dir stands. Every rank runs this function.

    Rank 0 alone samples and scores; all other work is collective.

    Args:
        engine: rank 0's, started on `model.path` and left running; None starts one for this run.
            With `policy.parallel.join_world` before it, and a `ReusedEngine`, one process can do
            many runs.
        stop: looked at before every step.

    Raises:
        RunStopped: on every rank, rank 0 was asked to stop.
    """
    with start_run(config, engine, stop) as run:
        engine = run.sampler.engine if run.sampler else None
        sync_weights(run.route, engine, version=run.done)
        if run.done == 0:
            log_step(run, 0, _evaluate(run, 0))
        timer = StepTimer()
        for step in range(run.done + 1, config.run.steps + 1):
            batch = next_batch(run, step, timer)  # a run that is asked to stop ends here, saved
            take_gpus(run, timer)
            drawn = train_sequences(batch) if batch else None
            sequences = share_sequences(drawn, run.policy.info.hosts)
            with timer("old_logprobs"):
                metrics = _set_old_logprobs(run, sequences, step)  # Megatron's, not the sampler's
            if config.measures_routing(step):
                with timer("routing"):
                    metrics |= _measure_routing(run, sequences)
            if config.reference_path is not None:
                with timer("ref_logprobs"):
                    metrics |= _set_ref_logprobs(run, sequences)
            with timer("train"):
                metrics |= _optimise(run, sequences, step)
            metrics |= batch_metrics(batch, step) if batch else {}
            abandoned = finish_sampling(run, timer, metrics)
            metrics |= guard(run, step, metrics)  # a collapse ends the run or takes it back
            saved = _save(run, step, metrics, timer, stops=abandoned)
            if not abandoned:  # else the engine is gone
                with timer("sync"):
                    metrics |= sync_weights(run.route, engine, version=step)
                if step == config.run.steps or step % config.eval.every == 0:
                    with timer("eval"):
                        metrics |= _evaluate(run, step)
            _finish_step(run, step, batch, metrics, timer)
            if saved:
                publish(run, step)
            if abandoned:
                stop_behind(run, step)
        if run.done == config.run.steps:  # no step was left, only the export is missing
            take_gpus(run, timer)
            export(run, run.done)
        if run.metrics:
            print_report(run.folder, predicted_and_measured(run.folder))


def _set_old_logprobs(run: Run, sequences: list[TrainSequence], step: int) -> dict[str, Any]:
    """Give every sequence its old log-probs and the routes that are replayed from now on, if any;
    returns how far the engine's log-probs are from the old ones.

    Raises:
        WeightSyncError: on every rank, the two do not compute the same model.
    """
    if not sequences:
        return {}
    replay = run.config.algorithm.routing_replay
    if replay == "rollout":
        for sequence in sequences:
            sequence.routes = sequence.rollout_routes
    if run.config.algorithm.old_policy == "sampler":
        for sequence in sequences:
            sequence.old_logprobs = sequence.rollout_logprobs
        return _route_bytes(sequences)
    routes = rollout_routes(sequences) if run.config.wants_rollout_routes(step) else None
    if replay == "old_policy":
        logprobs, recorded = run.policy.record_routes(without_loss(sequences), compare_with=routes)
        for sequence, own in zip(sequences, recorded, strict=True):
            sequence.routes = own
    else:
        logprobs = run.policy.compute_logprobs(without_loss(sequences), compare_with=routes)
    for sequence, values in zip(sequences, logprobs, strict=True):
        sequence.old_logprobs = values
    rollout_logprobs = [sequence.rollout_logprobs for sequence in sequences]
    mismatch = compute_mismatch(torch.cat(logprobs), torch.cat(rollout_logprobs))
    limit = run.config.rollout.logprob_diff_limit
    mean = mismatch.get("rollout/logprob_abs_diff_mean", 0.0)
    if limit is not None and not mean <= limit:
        raise WeightSyncError(
            f"step {step}: mean |trainer - engine| log-prob difference {mean:.3g} exceeds "
            f"rollout.logprob_diff_limit={limit:g}; the two do not compute the same model, or the "
            "limit is below the rounding of their number formats"
        )
    if replay == "rollout":
        mismatch["routing/disagreement"] = run.policy.route_agreement().disagreement
    algorithm = run.config.algorithm
    return (
        mismatch
        | _route_bytes(sequences)
        | correction_metrics(
            old_minus_rollout(sequences), algorithm.correction, algorithm.rejection
        )
    )


def _route_bytes(sequences: list[TrainSequence]) -> dict[str, int]:
    """Size of the routes that were brought to every rank: the engine's, and recorded ones."""
    shared = [s.rollout_routes for s in sequences]
    shared += [s.routes for s in sequences if s.routes is not s.rollout_routes]
    nbytes = sum(routes.nbytes for routes in shared if routes is not None)
    return {"routing/trainer_bytes": nbytes} if nbytes else {}


def _measure_routing(run: Run, sequences: list[TrainSequence]) -> dict[str, float]:
    """How far log-probs and routes are from the engine's, with free routing and with a replay.

    The pass of the old policy, if there was one, is one of the two.
    """
    routes = rollout_routes(sequences)
    if routes is None:  # the filter has left no response
        return {}
    config = run.config.algorithm
    done: dict[bool, RoutedPass] = {}
    if config.old_policy == "trainer":
        done[config.routing_replay == "rollout"] = RoutedPass(
            logprobs=torch.cat([old_logprobs(sequence) for sequence in sequences]),
            agreement=run.policy.route_agreement(),
        )
    return measure_routing_gap(run.policy, sequences, routes, done)


def _set_ref_logprobs(run: Run, sequences: list[TrainSequence]) -> dict[str, float]:
    """Give every sequence its reference log-probs; returns how far the old ones are from them."""
    if not sequences:
        return {}
    ref_logprobs = run.policy.compute_reference_logprobs(without_loss(sequences))
    for sequence, values in zip(sequences, ref_logprobs, strict=True):
        sequence.ref_logprobs = values
    old = [old_logprobs(sequence) for sequence in sequences]
    return reference_metrics(torch.cat(old), torch.cat(ref_logprobs))


def _optimise(run: Run, sequences: list[TrainSequence], step: int) -> dict[str, Any]:
    """All optimizer steps on one rollout batch; returns the means of their metrics.

    A mini-batch without loss is no optimizer step with a gradient of 0, which would still decay
    Adam's moments and the weights. All ranks have the same sequences, so they agree on it.
    """
    config = run.config.algorithm
    objective = build_objective(config)
    results: list[StepResult] = []
    num_groups = len({sequence.group for sequence in sequences})
    for epoch in range(config.epochs):
        if epoch > 0 and has_epoch_weights(config):
            epoch_start = run.policy.compute_logprobs(without_loss(sequences))
            set_epoch_weights(sequences, epoch_start, config.clip)
        for groups in split_mini_batches(num_groups, config.mini_batches):
            mini_batch = [sequence for sequence in sequences if sequence.group in groups]
            if not any(bears_loss(sequence, config) for sequence in mini_batch):
                continue
            settled, clip_range = _settle_clip(run, mini_batch)
            loss_sequences = build_loss_sequences(mini_batch, settled)
            results.append(run.policy.train_step(loss_sequences, objective))
            results[-1].metrics.update(clip_range)
            note_skipped(run, results[-1].skipped, step)
    metrics = _mean_metrics(results) | mask_metrics(sequences, config)
    return metrics | {"policy/skipped_in_a_row": run.bad_steps}


def _settle_clip(
    run: Run, mini_batch: list[TrainSequence]
) -> tuple[AlgorithmConfig, dict[str, float]]:
    """The settings of one optimizer step, and the clip range if it had to be searched for."""
    config = run.config.algorithm
    if not isinstance(config.clip, BalancedClip):
        return config, {}
    trained = [sequence for sequence in mini_batch if bears_loss(sequence, config)]
    live = run.policy.compute_logprobs(without_loss(trained))
    clip = searched_clip(trained, live, config.clip)
    bounds = {"policy/clip_low": 1.0 - clip.low, "policy/clip_high": 1.0 + clip.high}
    return config.model_copy(update={"clip": clip}), bounds


def _mean_metrics(results: list[StepResult]) -> dict[str, Any]:
    """Means over the optimizer steps that were made; extremes stay extremes."""
    made = [result for result in results if result.skipped is None]
    skipped = [result.skipped for result in results if result.skipped is not None]
    metrics: dict[str, Any] = {
        "policy/optimizer_steps": len(made),
        "policy/skipped_steps": len(skipped),
    }
    if skipped:
        metrics["policy/skipped_reason"] = skipped[-1]
    if not made:
        return metrics
    # A mini-batch without any response token has no per-token metrics.
    for name in {name: None for result in made for name in result.metrics}:
        values = [result.metrics[name] for result in made if name in result.metrics]
        pick = max if name.endswith("_max") else min if name.endswith("_min") else _mean
        metrics[name] = pick(values)
    metrics["policy/grad_norm"] = _mean([result.grad_norm for result in made])
    metrics["policy/learning_rate"] = made[-1].learning_rate
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _save(run: Run, step: int, metrics: dict[str, Any], timer: StepTimer, *, stops: bool) -> bool:
    """Save and export when due, before the engine takes the GPUs; returns whether it was saved.

    Args:
        stops: the run ends behind this step.
    """
    last = step == run.config.run.steps
    checkpoint = run.config.checkpoint
    saves = last or stops or step % checkpoint.every == 0 or ROLLED_BACK_TO in metrics
    if saves:
        with timer("checkpoint"):
            save(run, step)
    if last or (checkpoint.export_every and step % checkpoint.export_every == 0):
        with timer("export"):
            export(run, step)
    return saves


def _finish_step(
    run: Run, step: int, batch: ScoredBatch | None, metrics: dict[str, Any], timer: StepTimer
) -> None:
    """Write down what the step was."""
    if batch:
        _write_rollouts(run, step, batch)
    seconds = timer.finish_step()
    tokens = metrics.get("rollout/response_tokens", 0)
    metrics["perf/response_tokens_per_s"] = tokens / seconds["time/total_s"]
    metrics["perf/memory_peak_gib"] = run.memory.gib()
    if batch and run.rates:
        metrics |= run.rates.metrics(_lengths(batch), seconds)
    log_step(run, step, metrics | seconds)


def _lengths(batch: ScoredBatch) -> list[int]:
    return [
        len(group.prompt.token_ids) + len(rollout.token_ids)
        for group in batch.groups
        for rollout in group.rollouts
    ]


def _evaluate(run: Run, step: int) -> dict[str, float]:
    return run.sampler.evaluate(version=step) if run.sampler else {}


def _write_rollouts(run: Run, step: int, batch: ScoredBatch) -> None:
    write_rollouts(
        run.folder.rollouts(step),
        batch.groups,
        rewards=batch.rewards,
        reward_parts=batch.reward_parts,
        advantages=batch.advantages.values.tolist(),
        limit=run.config.tracking.rollouts_per_step,
    )
