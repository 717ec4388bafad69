"""Judges every step, and ends the run or takes it back when it has collapsed."""

import logging
from typing import Any, Never

from megatron_cpgd.errors import ConversionError, TrainingDivergedError
from megatron_cpgd.policy.checkpoint import check_checkpoint
from megatron_cpgd.policy.share import share_integer
from megatron_cpgd.run import Run, log_step, point_latest_to
from megatron_cpgd.stability.detector import Finding
from megatron_cpgd.tracking.run_folder import RunFolder

logger = logging.getLogger(__name__)

ROLLED_BACK_TO = "stability/rolled_back_to"
"""Metric of a step that ended with the weights of an earlier checkpoint; it is then saved."""
_GO_ON, _STOP = 0, -1  # any other decision is the step of the checkpoint to go back to


def guard(run: Run, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Look for a collapse between the step's updates and the engine's refresh. Collective.

    After a roll back the policy holds the weights and the optimizer state of an earlier checkpoint;
    steps and prompts go on.

    Args:
        metrics: rank 0's, of the whole step.

    Returns:
        Metrics, on rank 0; `ROLLED_BACK_TO` on every rank.

    Raises:
        TrainingDivergedError: on every rank, the run must end. Nothing of this step is saved.
    """
    found: dict[str, Any] = {}
    findings: list[Finding] = []
    decision = _GO_ON
    if run.detector:
        found |= run.detector.grad_norm_z(metrics)
        findings = run.detector.observe(step, metrics)
        for finding in findings:
            logger.warning(finding.message)
        if run.detector.causes:
            found["stability/findings"] = run.detector.causes
        findings = [each for each in findings if _acts(run, each)]
        decision = _decide(run, findings)
    decision = share_integer(decision)
    if decision == _STOP:
        log_step(run, step, metrics | found)
        _stop(run, step, findings)
    if decision != _GO_ON:
        _roll_back(run, step, decision)
        found[ROLLED_BACK_TO] = decision
    if run.config.stability.action == "roll_back":
        found["stability/roll_backs"] = run.roll_backs
        found["stability/lr_scale"] = run.policy.lr_scale
    return found


def _acts(run: Run, finding: Finding) -> bool:
    acts = run.config.stability.action in ("stop", "roll_back")
    return finding.acts == "always" or (finding.acts == "as_set" and acts)


def _decide(run: Run, findings: list[Finding]) -> int:
    stability = run.config.stability
    if not findings:
        return _GO_ON
    if stability.action != "roll_back" or run.roll_backs >= stability.max_roll_backs:
        return _STOP
    return _last_good(run.folder, findings) or _STOP


def _last_good(folder: RunFolder, findings: list[Finding]) -> int | None:
    """Step of the newest checkpoint before all findings began that a run can go on from."""
    onset = min(finding.onset for finding in findings)
    for step in reversed(folder.checkpoint_steps()):
        if step < onset and _is_usable(folder, step):
            return step
    return None


def _is_usable(folder: RunFolder, step: int) -> bool:
    try:
        # Without an optimizer state, Adam would keep the moments of the collapse.
        return bool(check_checkpoint(folder.checkpoint(step))["has_optimizer"])
    except ConversionError as error:
        logger.warning("not a checkpoint to go back to: %s", error)
        return False


def _roll_back(run: Run, step: int, target: int) -> None:
    run.policy.roll_back(run.folder.checkpoint(target), lr_factor=run.config.stability.lr_factor)
    run.roll_backs += 1
    run.bad_steps = 0
    if run.detector and run.batches:  # rank 0
        run.detector.reset()
        run.batches.clear()  # sampled by the weights that were given up
        if run.sampler and run.sampler.in_flight:
            run.sampler.in_flight.groups.clear()
    logger.warning(
        "step %d: went back to the weights of %s; the learning rate is scaled by %g from now on",
        step, run.folder.checkpoint(target), run.policy.lr_scale,
    )  # fmt: skip


def _stop(run: Run, step: int, findings: list[Finding]) -> Never:
    if not run.detector:
        raise TrainingDivergedError(f"step {step}: rank 0 ends the run")
    lines = [finding.message for finding in findings]
    good = _last_good(run.folder, findings)
    if good is None:
        lines.append("there is no checkpoint from before that; start a new run")
    else:
        point_latest_to(run.folder, good)
        lines.append(
            f"the last good checkpoint is {run.folder.checkpoint(good)}: the same command goes on "
            "from there, with other settings of `stability` if you like"
        )
    stability = run.config.stability
    if stability.action == "roll_back" and run.roll_backs >= stability.max_roll_backs:
        lines.append(f"stability.max_roll_backs={stability.max_roll_backs} are used up")
    raise TrainingDivergedError("\n  ".join([f"step {step}: the run has collapsed", *lines]))
