"""What a plan says to be tight: fits, but only barely."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cpgd.config.load import load_config, read_config
from megatron_cpgd.planning.estimate import make_plan
from megatron_cpgd.planning.machine import GIB, GPUS
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.report import as_json, format_plan
from megatron_cpgd.planning.search import UTILIZATION
from megatron_cpgd.planning.workload import assumed_lengths
from tests.helpers.planning import MODELS, public_model
from tests.helpers.valid_run import write_run

QWEN3_32B = "cpgd-qwen3-32b-4n8g-tp4pp2"


def recipe(name: str, model: str, machine: str, *overrides: str) -> Plan:
    config = load_config(MODELS.parent / f"{name}.yaml", list(overrides), MODELS / model)
    return make_plan(public_model(model), config, GPUS[machine], assumed_lengths(config))


def test_a_kv_cache_that_slows_sampling_is_named_with_what_more_would_bring() -> None:
    plan = recipe(QWEN3_32B, "Qwen3-32B", "h100")
    # 1024 sequences of 2 engines; the room for 4096 + 512 tokens of each is short of that.
    assert plan.engine.cache_tokens // 4608 < 512
    [_, cache] = plan.tight
    assert cache.startswith("KV cache: an engine samples 172 sequences together in 407.9 s, with ")
    # 512 of 4096 tokens in the 8192 iterations of the longest.
    assert cache.endswith("with room for 256 in 344.7 s")
    assert plan.generation.total == pytest.approx(407.9, abs=0.1)
    assert f"tight: {cache}\nFITS: " in format_plan(plan)
    assert as_json(plan)["tight"] == list(plan.tight)


def test_a_cache_with_room_for_all_is_not_tight() -> None:
    plan = recipe(QWEN3_32B, "Qwen3-32B", "h100", "rollout.prompts_per_step=32")
    assert not any("KV cache" in text for text in plan.tight)


def test_a_gpu_is_tight_from_nine_tenths_of_what_may_be_filled() -> None:
    # While sampling the context of 3 GiB is beside the engine. 75.7 GiB may be filled, 68.1 of them
    # are nine tenths: 0.81 of 79.6 and 3 are 67.5, 0.82 and 3 are 68.3.
    loose, tight = (
        recipe(QWEN3_32B, "Qwen3-32B", "h100", f"{UTILIZATION}={share}") for share in (0.81, 0.82)
    )
    assert not any("GPU memory" in text for text in loose.tight)
    assert tight.tight[0] == (
        "GPU memory of stage 0 while sampling: 68.3 GiB of the 75.7 GiB that may be filled"
    )


def test_a_host_is_tight_too() -> None:
    name, model = "cpgd-deepseek-v3-32+4n8g-pp16ep16", "DeepSeek-V3"
    config = load_config(MODELS.parent / f"{name}.yaml", [], MODELS / model)
    lengths = assumed_lengths(config)
    plans = [
        make_plan(
            public_model(model), config, replace(GPUS["h200"], host_memory=gib * GIB), lengths
        )
        for gib in (700, 760)
    ]
    # 627 GiB of FP8 weights, eight workers and eight receivers of 3 GiB; nine tenths are 630, 684.
    assert plans[0].tight == (
        "host memory of a node of engines: 674.9 GiB of the 700.0 GiB that may be filled",
    )
    assert plans[1].tight == ()


def test_of_what_does_not_fit_nothing_is_tight(tmp_path: Path) -> None:
    config = read_config(write_run(tmp_path))
    plan = make_plan(public_model("Qwen3-8B"), config, GPUS["h100"], assumed_lengths(config))
    assert plan.problems and not plan.tight


def test_sampling_on_the_trainer_s_gpus_hides_nothing(tmp_path: Path) -> None:
    stale = ["rollout.staleness=1", "rollout.overlap=true", "parallel.tp=4"]
    beside, own = (
        make_plan(public_model("Qwen2.5-7B"), config, GPUS["h100"], assumed_lengths(config))
        for more in ([], ["rollout.devices=[4]"])
        for config in [read_config(write_run(tmp_path), stale + more)]
    )
    assert beside.seconds.generate == beside.generation.total == own.generation.total
    assert own.seconds.generate < own.generation.total
