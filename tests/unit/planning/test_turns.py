"""Engines that sleep while the trainer works, and its state that is away while they do."""

import pytest

from megatron_cpgd.config.load import load_config
from megatron_cpgd.planning.machine import GIB, GPUS
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.search import Planner, find_fixes
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import MODELS, public_config, public_model

CONFIGS = MODELS.parent
RECIPES = {
    "cpgd-qwen2.5-7b-1n8g-tp2": "Qwen2.5-7B",
    "cpgd-qwen3-8b-1n8g-tp2": "Qwen3-8B",
    "cpgd-qwen3-32b-4n8g-tp4pp2": "Qwen3-32B",
    "cpgd-qwen3-30b-a3b-2n8g-tp4ep8": "Qwen3-30B-A3B",
    "cpgd-llama-3.1-70b-8n8g-tp8pp4": "Llama-3.1-70B",
    "cpgd-qwen2.5-72b-8n8g-tp8pp4": "Qwen2.5-72B",
    "cpgd-glm-4.5-air-8n8g-tp4pp2cp2ep16": "GLM-4.5-Air",
}
QWEN3_8B = "cpgd-qwen3-8b-1n8g-tp2"
AWAKE = ("rollout.sleep=false", "optim.offload=false")
BESIDE = "rollout.engine_args.gpu_memory_utilization=0.41"


def planner(recipe: str, *overrides: str) -> Planner:
    """On H100, whose 81 559 MiB are 79.6 GiB."""
    model = RECIPES[recipe]
    config = load_config(CONFIGS / f"{recipe}.yaml", list(overrides), MODELS / model)
    return Planner(
        model=public_model(model), hf=public_config(model), config=config, machine=GPUS["h100"],
        lengths=assumed_lengths(config),
    )  # fmt: skip


def plan_of(recipe: str, *overrides: str) -> Plan:
    plan = planner(recipe, *overrides).plan({})
    assert plan is not None
    return plan


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_whose_engines_sleep_fit(recipe: str) -> None:
    plan = plan_of(recipe)
    assert plan.workload.engine.sleeps and plan.fits, plan.problems


def test_engines_that_sleep_share_nothing_with_the_passes_but_a_residue() -> None:
    turns, together = plan_of(QWEN3_8B), plan_of(QWEN3_8B, *AWAKE, BESIDE)
    assert turns.worst.total == together.worst.total
    assert turns.beside(0) == 2 * GIB
    assert together.beside(0) == int(0.41 * 81_559 * 2**20)
    assert together.sampling is None and together.fullest.phase == "training"


def test_while_engines_sample_a_rank_has_its_state_or_nothing_but_its_context() -> None:
    away, here = plan_of(QWEN3_8B), plan_of(QWEN3_8B, "optim.offload=false")
    assert away.sampling is not None and here.sampling is not None
    assert away.sampling.engine == here.sampling.engine == int(0.85 * 81_559 * 2**20)
    assert away.sampling.trainer == 3 * GIB
    rank = here.worst
    assert here.sampling.trainer == rank.weights + rank.gradients + rank.optimizer + 3 * GIB
    assert away.fits and away.fullest.phase == "sampling"
    [problem] = here.problems
    assert problem.startswith("GPU memory while sampling: a rank of stage 0 needs 105.0 GiB, 67.7")


def test_state_that_leaves_costs_two_transfers_and_memory_of_the_host() -> None:
    away, here = plan_of(QWEN3_8B), plan_of(QWEN3_8B, "optim.offload=false")
    # 4.10 B parameters of a rank: 2 bytes each, and 12 of a quarter of them, at 64 GB/s.
    nbytes = 4.10e9 * (2 + 12 / 4)
    assert away.seconds.reload == pytest.approx(nbytes / 64e9, rel=1e-2)
    assert away.seconds.sync - here.seconds.sync == pytest.approx(away.seconds.reload)
    assert away.seconds.total - here.seconds.total == pytest.approx(2 * away.seconds.reload)
    assert away.host.total - here.host.total == pytest.approx(8 * nbytes, rel=1e-2)
    assert here.host.offload == 0


def test_taking_turns_is_the_fix_where_a_trainer_leaves_an_engine_no_room() -> None:
    # On 8 GPUs a rank has an eighth of 29 B parameters in experts, 18 bytes each without a replica:
    # 61 of the 75.7 GiB that may be filled, before the rest of the model and the passes.
    full = planner("cpgd-qwen3-30b-a3b-2n8g-tp4ep8", *AWAKE, "parallel.dp=2")
    plan = full.plan({})
    assert plan is not None and not plan.fits
    turns = {"rollout.sleep": True, "optim.offload": True}
    assert [fix.overrides for fix in find_fixes(full)] == [turns]


def test_a_share_that_is_too_large_beside_the_idle_trainer_is_lowered() -> None:
    full = planner(QWEN3_8B, "optim.offload=false")
    [fix] = [each for each in find_fixes(full) if len(each.overrides) == 1][:1]
    # 75.7 GiB may be filled; weights, gradients, a share of the optimizer and a context take 37.3.
    assert fix.overrides == {"rollout.engine_args.gpu_memory_utilization": 0.48}
