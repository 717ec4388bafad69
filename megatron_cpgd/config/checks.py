"""Rules between settings, and between settings and the machine; no torch and no Megatron here.

Each rule yields problems of one line: where, what was expected, what came, what to do.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_cpgd.config.algorithm_checks import CUDA_GRAPHS, check_algorithm
from megatron_cpgd.config.fp8_checks import check_fp8_switches
from megatron_cpgd.config.messages import did_you_mean
from megatron_cpgd.config.model_folder import check_model_config, check_model_folder
from megatron_cpgd.config.rollout_checks import check_rollout
from megatron_cpgd.config.schema import (
    MACHINES,
    ExactMatchReward,
    ExperimentConfig,
    FormatReward,
    MathReward,
    PythonReward,
)
from megatron_cpgd.config.stability import StabilityConfig
from megatron_cpgd.config.upstream import check_option_names


def check_config(config: ExperimentConfig, model_config: Path | None = None) -> list[str]:
    """Every problem of a configuration whose single settings are valid; empty if there is none.

    Args:
        model_config: folder with the model's config.json, to check a run whose model and data are
            not on this machine.
    """
    if model_config is None:
        files = [*_paths(config), *check_model_folder(config)]
    else:
        files = check_model_config(config, model_config)
    return [
        *check_settings(config),
        *check_option_names(config),
        *files,
        *_world_size(config),
    ]


def check_settings(config: ExperimentConfig) -> list[str]:
    """The problems that are none of files, of the model or of this machine."""
    return [
        *check_algorithm(config),
        *check_rollout(config),
        *_router(config),
        *_inert_switches(config),
        *_inert_stability(config),
        *check_fp8_switches(config),
        *_batch_sizes(config),
        *_evaluations(config),
        *_rewards(config),
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


def _inert_switches(config: ExperimentConfig) -> Iterator[str]:
    optim, parallel = config.optim, config.parallel
    if parallel.vpp > 1 and parallel.pp == 1:
        yield (
            f"parallel.vpp={parallel.vpp} needs a pipeline, but parallel.pp=1; "
            "set parallel.pp > 1 or parallel.vpp=1"
        )
    stages, given = parallel.pp * parallel.vpp, parallel.stage_layers
    if given is not None and len(given) != stages:
        yield (
            f"parallel.stage_layers has {len(given)} numbers, but parallel.pp={parallel.pp} * "
            f"vpp={parallel.vpp} = {stages} stages; give one number for each"
        )
    elif given is not None and stages == 1:
        yield "parallel.stage_layers does nothing: parallel.pp=1 is no pipeline; remove it"
    ranks = parallel.tp * parallel.cp * parallel.dp
    if ranks % (parallel.ep * parallel.etp):
        yield (
            f"parallel.ep={parallel.ep} * etp={parallel.etp} must divide tp={parallel.tp} * "
            f"cp={parallel.cp} * dp={parallel.dp} = {ranks}: the experts are spread over these "
            "ranks; change one of them"
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
    every, steps = config.tracking.routing_every, config.run.steps
    if every is not None and every > steps:
        yield (
            f"tracking.routing_every={every} does nothing: the first measurement is that of step "
            f"{every}, and run.steps={steps}; set routing_every <= {steps}"
        )


def _router(config: ExperimentConfig) -> Iterator[str]:
    balancing = any(value > 0 for _, value in config.router)
    for name in CUDA_GRAPHS:
        value = config.model.megatron.get(name)
        if balancing and value not in (None, False, "none"):
            yield (
                f"model.megatron.{name}={value} repeats a captured pass, whose padding may lie "
                "elsewhere; remove it or the settings of section `router`"
            )


def _inert_stability(config: ExperimentConfig) -> Iterator[str]:
    stability = config.stability
    set_mismatch = stability.mismatch is not None and stability.changes("mismatch")
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
        if stability.changes(name):
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
    machine = config.tracking.machine
    if machine is not None and machine not in MACHINES and not Path(machine).is_file():
        yield (
            f"tracking.machine={machine}: neither one of {', '.join(MACHINES)} nor a file, seen "
            f"from {Path.cwd()}"
        )
    if config.run.dir.exists() and not config.run.dir.is_dir():
        yield f"run.dir={config.run.dir}: must be a folder, but is a file"
    for parent in config.run.dir.parents:
        if parent.exists() and not parent.is_dir():
            yield f"run.dir={config.run.dir}: {parent} is a file; use a path through folders"


def _world_size(config: ExperimentConfig) -> Iterator[str]:
    processes, sizes = os.environ.get("WORLD_SIZE"), config.parallel
    if processes is not None and processes != str(sizes.world_size):
        yield (
            f"parallel.tp={sizes.tp} * pp={sizes.pp} * cp={sizes.cp} * dp={sizes.dp} = "
            f"{sizes.world_size}, but WORLD_SIZE={processes} processes were started; "
            "set parallel.* or start as many"
        )
