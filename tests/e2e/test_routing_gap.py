"""The routes of vLLM and a trainer with noise on its routers: how much a replay takes away.

The table is printed: `pytest -rP`.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.types import TrainSequence
from tests.helpers.full_run import settings, write_assets, write_moe_model, write_yaml
from tests.helpers.gap_jobs import load_tool, measure_job, noisy_replay_job, shifted_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny_moe_engine import moe_config

NOISES = [0.0, 0.01, 0.03, 0.1, 0.3]


@dataclass(frozen=True)
class Sampled:
    """A run, and the batch that vLLM has sampled for it."""

    yaml: Path
    config: ExperimentConfig
    sequences: list[TrainSequence]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory) -> Sampled:
    folder = write_assets(tmp_path_factory.mktemp("gap"))
    write_moe_model(folder, "model", moe_config)
    content = settings(folder)
    content["run"]["dir"] = str(folder / "run")
    content["rollout"] |= {"prompts_per_step": 24, "max_response_tokens": 24}
    yaml = write_yaml(folder / "run.yaml", content)
    tool = load_tool()
    config = tool.read_run(yaml, ["parallel={tp: 1}"])
    return Sampled(yaml, config, tool.sample(config))


@pytest.fixture(scope="module")
def rows(sampled) -> list[dict[str, float]]:
    [rows] = run_distributed(1, measure_job, sampled.config, sampled.sequences, NOISES)
    return rows


def test_the_same_routers_in_fp32_leave_no_gap(rows):
    assert rows[0]["routing/free_disagreement"] == rows[0]["routing/fallback_frac"] == 0
    for kind in ("free", "replayed"):
        assert rows[0][f"routing/{kind}_logprob_abs_diff_max"] < 1e-4


def test_a_replay_shrinks_the_gap_that_noisy_routers_make(sampled, rows):
    tokens = sum(len(sequence.response_ids) for sequence in sampled.sequences)
    load_tool().print_rows(rows, tokens=tokens)
    noisy = rows[NOISES.index(0.1)]
    assert noisy["routing/free_disagreement"] > 0.05
    assert noisy["routing/free_disagreement"] < noisy["routing/free_disagreement_token_frac"]
    for gap in ("logprob_abs_diff_mean", "kl_k3"):
        free, replayed = noisy[f"routing/free_{gap}"], noisy[f"routing/replayed_{gap}"]
        assert 1e-5 < replayed < 0.7 * free  # the gates of the same experts still differ


def test_a_replay_sends_every_token_that_was_fed_where_the_engine_did(sampled, tmp_path):
    [results] = run_distributed(
        1, noisy_replay_job, sampled.config, sampled.sequences[:16], 0.1, tmp_path
    )
    elsewhere = 0
    for sequence, (replayed, free) in zip(sampled.sequences, results, strict=False):
        expected = torch.zeros(free[:-1].shape, dtype=torch.bool)
        expected.scatter_(2, sequence.rollout_routes[:-1].long(), True)
        assert torch.equal(replayed[:-1], expected)
        elsewhere += int((free[:-1] != expected).any(dim=2).sum())
    assert elsewhere > 0


# Two random sets of 3 of 8 experts are the same once in 56.
def test_routes_shifted_by_a_token_or_a_layer_show_at_once(sampled):
    [(token, layer)] = run_distributed(1, shifted_job, sampled.config, sampled.sequences, [0, 1])
    for row in (token, layer):
        assert row["routing/free_disagreement"] > 0.7
        assert row["routing/replayed_logprob_abs_diff_mean"] > 0.01


def test_a_dense_model_has_no_gap_to_measure(assets, tmp_path, capsys):
    content = settings(assets)
    content["run"]["dir"] = str(tmp_path / "run")
    assert load_tool().main([str(write_yaml(tmp_path / "run.yaml", content))]) == 2
    assert "has no experts, so no routes to measure" in capsys.readouterr().err
