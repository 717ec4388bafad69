"""Runs that train on the routes of vLLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.full_run import (
    read_rows,
    run_cli,
    settings,
    write_assets,
    write_moe_model,
    write_yaml,
)
from tests.helpers.tiny import add_prediction_layers
from tests.helpers.tiny_moe_engine import deepseek_config, glm_config, moe_config

pytestmark = pytest.mark.slow

Rows = list[dict[str, Any]]


CONFIGS = {"qwen3_moe": moe_config, "deepseek_v3": deepseek_config, "glm4_moe": glm_config}


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Callable[..., Rows]:
    """train(name, model=..., **sections over those of a usual run) -> the row of every step."""
    folder: Path = write_assets(tmp_path_factory.mktemp("assets"))
    for name, build_config in CONFIGS.items():
        write_moe_model(folder, name, build_config)
        if name != "qwen3_moe":  # as released; neither side computes them
            add_prediction_layers(folder / name, 1)

    def run(name: str, model: str = "qwen3_moe", **sections: dict[str, Any]) -> Rows:
        content = settings(folder) | {"model": {"path": str(folder / model)}}
        content["run"] = {"steps": 2, "dir": str(folder / name)}
        for section, values in sections.items():
            content[section] = content[section] | values
        finished = run_cli("train", write_yaml(folder / f"{name}.yaml", content), folder=folder)
        assert finished.code == 0, finished.err
        return read_rows(folder / name / "metrics.jsonl")[1:]

    return run


# Both compute in fp32 with the same weights: a route in a wrong place would show at once.
@pytest.mark.parametrize("model", CONFIGS)
def test_the_trainers_routers_agree_with_the_replayed_routes(train, model):
    layout = {"tp": 1, "dp": 2, "ep": 2}
    for row in train(model, model, parallel=layout, algorithm={"routing_replay": "rollout"}):
        print(row["rollout/logprob_abs_diff_max"])
        assert row["routing/disagreement"] == 0
        assert row["rollout/logprob_abs_diff_max"] < 1e-4
        assert row["policy/optimizer_steps"] == 4


def test_in_bf16_replay_takes_the_routing_out_of_the_mismatch(train):
    rows = {
        replay: train(
            replay,
            parallel={"tp": 1},
            precision={"train": "bf16"},
            rollout={"prompts_per_step": 24, "samples_per_prompt": 8, "max_response_tokens": 40},
            algorithm={"routing_replay": replay},
            optim={"lr": 1e-4},
        )
        for replay in ("none", "rollout")
    }
    names = ["routing/disagreement"]
    names += [
        f"rollout/{name}" for name in ("logprob_abs_diff_mean", "logprob_abs_diff_max", "kl_k3")
    ]
    for replay, steps in rows.items():
        print(replay, [[step.get(name) for name in names] for step in steps])
    for free, replayed in zip(rows["none"], rows["rollout"], strict=True):
        assert 0 < replayed["routing/disagreement"] < 0.05
        for name in names[2:]:
            assert replayed[name] < 0.3 * free[name]


# Only the engine of one of the two returns routes at all.
def test_a_measurement_in_every_second_step_changes_no_bit_of_a_run(train):
    usual: dict[str, Any] = {"run": {"steps": 3}, "parallel": {"tp": 1}}
    plain = train("plain", **usual)
    measured = train("measured", **usual, tracking={"routing_every": 2})
    for step, (expected, row) in enumerate(zip(plain, measured, strict=True), 1):
        same = {name for name in expected if not name.startswith(("time/", "perf/"))}
        assert {name: row[name] for name in same} == {name: expected[name] for name in same}
        assert row["weights/digest"] == expected["weights/digest"]
        more = {name for name in row.keys() - same if name.startswith("routing/")}
        assert bool(more) == (step == 2)
