"""Predicted bytes against the tensors of a real Megatron policy, rank by rank."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpgd.planning.activations import Passes, layer_bytes
from megatron_cpgd.planning.layout import layout_of
from megatron_cpgd.planning.machine import cpu_machine, with_factors
from megatron_cpgd.planning.memory import TrainerSettings, rank_memory
from megatron_cpgd.planning.model import Model, read_model
from megatron_cpgd.planning.state import state_bytes
from tests.helpers.plan_jobs import held_bytes_job, resident_bytes_job, saved_bytes_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

CASES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "dp2_cp2_fp32": ("qwen3", {"dp": 2, "cp": 2}, "fp32", True),
    "tp2_bf16_unsharded_optimizer": ("qwen3", {"tp": 2}, "bf16", False),
    "pp2_vpp2_dp2_bf16": ("qwen3", {"pp": 2, "vpp": 2, "dp": 2}, "bf16", True),
    "tied_pp2_bf16": ("tied", {"pp": 2}, "bf16", True),
    "tp2_dp2_ep2_etp2_bf16": ("qwen3_moe", {"tp": 2, "dp": 2, "ep": 2, "etp": 2}, "bf16", True),
    "glm_dp4_ep2_bf16": ("glm4_moe", {"dp": 4, "ep": 2}, "bf16", True),
    "gpt_oss_tp2_ep2_fp32": ("gpt_oss", {"tp": 2, "ep": 2}, "fp32", True),
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "tied": {"head_dim": 64, "tie_word_embeddings": True},
    "qwen3_moe": {"head_dim": 64, "mlp_only_layers": [1]},
    "glm4_moe": {"head_dim": 64},
    "gpt_oss": {"head_dim": 64},
    "deepseek_v3": {},
}
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def tiny(folder: Path, name: str, **sizes: Any) -> tuple[Path, Model]:
    path = folder / f"{name}_{len(sizes)}_{sizes.get('num_hidden_layers', 0)}"
    if not path.exists():
        save_tiny_model(path, name.replace("tied", "qwen3"), **(sizes or SIZES[name]))
    return path, read_model(json.loads((path / "config.json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_weights_gradients_and_optimizer_state_are_predicted_to_the_byte(
    folder: Path, case: str
) -> None:
    name, parallel, precision, sharded = CASES[case]
    path, model = tiny(folder, name)
    config = tiny_config(
        path,
        parallel=parallel,
        precision={"train": precision},
        optim={"lr": 1e-3, "distributed": sharded},
    )
    layout = layout_of(config.parallel)
    held = run_distributed(layout.world_size, held_bytes_job, config)
    per_stage = layout.world_size // layout.pp
    for stage in range(layout.pp):
        ranks = held[stage * per_stage : (stage + 1) * per_stage]
        planned = state_bytes(
            model, layout, stage, precision=config.precision.train, distributed=sharded
        )
        assert {rank.weights for rank in ranks} == {planned.weights}
        assert {rank.gradients for rank in ranks} == {planned.gradients}
        assert max(rank.optimizer for rank in ranks) == planned.optimizer


def test_parameters_of_odd_sizes_leave_gaps_that_the_prediction_counts_as_state(
    folder: Path,
) -> None:
    path, model = tiny(folder, "deepseek_v3")
    config = tiny_config(path, parallel={"dp": 2, "ep": 2}, precision={"train": "bf16"})
    held = run_distributed(2, held_bytes_job, config)
    planned = state_bytes(model, layout_of(config.parallel), 0, precision="bf16", distributed=True)
    assert {rank.weights for rank in held} == {planned.weights}
    worst = max(rank.optimizer for rank in held)
    assert 0 <= planned.optimizer - worst < 0.005 * worst


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"dp": 2}])
@pytest.mark.parametrize("hidden", [256, 512])
def test_the_resident_set_of_a_cpu_rank_is_predicted_to_fifteen_percent(
    folder: Path, hidden: int, parallel: dict[str, Any]
) -> None:
    sizes = {
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": hidden // 8,
    }  # fmt: skip
    path, model = tiny(folder / str(hidden), "qwen3", **sizes)
    config = tiny_config(
        path,
        parallel=parallel,
        precision={"train": "fp32"},
        batch={"tokens_per_micro_batch": 1024},
    )
    sequences = tiny_sequences(groups=64, size=8)
    measured = run_distributed(2, resident_bytes_job, config, sequences)[0]
    settings = TrainerSettings(
        passes=Passes(precision="fp32", recompute="none", accelerator=False),
        distributed_optimizer=True, micro_tokens=1024,
        chunk_tokens=config.batch.logprob_chunk_tokens, reference=False,
    )  # fmt: skip
    # The ranks are forks of a process that has loaded the libraries: 64 MiB remain of what a rank
    # takes for itself.
    machine = with_factors(cpu_machine(), rank_memory=64 << 20)
    planned = rank_memory(model, layout_of(config.parallel), 0, settings, machine)
    assert planned.total / 2**30 == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("name", "parallel", "precision"),
    [
        ("qwen3", {}, "fp32"),
        ("qwen3", {"tp": 2}, "bf16"),
        ("qwen3", {"cp": 2}, "fp32"),
        ("qwen3_moe", {}, "bf16"),
    ],
)
def test_what_a_layer_saves_is_predicted_to_five_percent(
    folder: Path, name: str, parallel: dict[str, Any], precision: Any
) -> None:
    saved = []
    for layers in (2, 3):  # the difference is one layer
        path, model = tiny(folder, name, num_hidden_layers=layers, **WIDE)
        config = tiny_config(
            path,
            parallel=parallel,
            precision={"train": precision},
            batch={"tokens_per_micro_batch": 512},
        )
        layout = layout_of(config.parallel)
        saved.append(max(run_distributed(layout.world_size, saved_bytes_job, config)))
    passes = Passes(precision=precision, recompute="none", accelerator=False)
    planned = layer_bytes(model, layout, 2, passes) * 512 / layout.cp
    assert planned == pytest.approx(saved[1] - saved[0], rel=0.05)
