"""What some objectives and measurements need beside the passes of every run."""

import pytest

from megatron_cpgd.config.load import load_config
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import GPUS
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import MODELS, public_model

RATIO = "algorithm.policy={type: ratio}"
BALANCED = "algorithm={preset: bapo, mini_batches: 4}"


def plan_of(
    *overrides: str, recipe: str = "cpgd-qwen3-8b-1n8g-tp2", model: str = "Qwen3-8B"
) -> Plan:
    config = load_config(MODELS.parent / f"{recipe}.yaml", list(overrides), MODELS / model)
    return make_plan(public_model(model), config, GPUS["h100"], assumed_lengths(config))


# CPGD weighs every epoch but the first by the policy at its start; BAPO looks at the live policy
# before each optimizer step, which is once around the batch in an epoch.
@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["algorithm.epochs=1"], 0),
        (["algorithm.epochs=3"], 2),
        (["algorithm.epochs=3", RATIO], 0),
        ([BALANCED, "algorithm.epochs=2"], 2),
    ],
)
def test_passes_that_an_objective_adds_are_predicted_in_the_time_of_training(overrides, passes):
    plan = plan_of(*overrides)
    forward = plan.seconds.old_logprobs  # one pass
    assert forward == plan_of().seconds.old_logprobs > 0
    assert plan.seconds.train - plan.training.total == pytest.approx(passes * forward)


def test_routes_that_are_only_measured_take_memory_too():
    moe = {"recipe": "cpgd-qwen3-30b-a3b-2n8g-tp4ep8", "model": "Qwen3-30B-A3B"}
    none, replayed, measured = (
        plan_of(f"algorithm.routing_replay={replay}", f"tracking.routing_every={every}", **moe)
        for replay, every in (("none", "null"), ("rollout", "null"), ("none", "5"))
    )
    assert none.host.batch < replayed.host.batch == measured.host.batch
