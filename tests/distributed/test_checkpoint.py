"""A checkpoint of any layout continues under any other as if nothing had happened."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy.checkpoint import check_checkpoint
from tests.helpers.checkpoint_jobs import (
    broken_step_job,
    continue_job,
    gathered_save_job,
    incomplete_state_job,
    optimizer_state_job,
    roll_back_job,
    save_job,
    upstream_step_job,
)
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3")
    return path


@pytest.fixture(scope="module")
def sequences(model):
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(model), plain)
    return with_old_logprobs(plain, logprobs)


@pytest.fixture(scope="module")
def saved(model, sequences, tmp_path_factory):
    """(folder, log-probs of the uninterrupted run), saved by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("checkpoints") / "step_000002"
    config = tiny_config(model, parallel={"tp": 2})
    return folder, run_distributed(2, save_job, config, sequences, folder)[0]


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tp": 2}, {"pp": 2, "vpp": 2}, {"pp": 2, "stage_layers": [1, 3]}, {"dp": 2}],
    ids=["1", "tp2", "pp2vpp2", "pp2unequal", "dp2"],
)
def test_the_third_step_after_loading_equals_the_uninterrupted_one(
    model, sequences, saved, parallel
):
    folder, expected = saved
    config = tiny_config(model, parallel=parallel)
    result = run_distributed(config.parallel.world_size, continue_job, config, sequences, folder)
    assert result[0]["state"]["step"] == 2
    assert result[0]["optimizer_steps"] == 3
    # A wrong Adam step count or a lost moment shows as 1e-1 here: one step moves them by that.
    assert (result[0]["logprobs"] - expected).abs().max() < 1e-3


# Each has another number of optimizers than at least one other: experts of their own, or not.
EXPERT_LAYOUTS = {
    "1": {},
    "dp2_ep2": {"dp": 2, "ep": 2},
    "tp2": {"tp": 2},
    "pp2_dp2_ep2": {"pp": 2, "dp": 2, "ep": 2},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """(model, sequences); the first of two pipeline stages has no experts."""
    path = tmp_path_factory.mktemp("experts")
    save_tiny_model(path, "qwen3_moe", mlp_only_layers=[0, 1])
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), plain)
    return path, with_old_logprobs(plain, logprobs)


@pytest.mark.parametrize(
    ("source", "target"),
    [("1", "pp2_dp2_ep2"), ("dp2_ep2", "1"), ("tp2", "dp2_ep2"), ("pp2_dp2_ep2", "tp2")],
)
def test_experts_resume_under_another_layout(experts, source, target, tmp_path):
    path, sequences = experts
    folder = tmp_path / "step_000002"
    results = []
    for layout, job in ((source, save_job), (target, continue_job)):
        config = tiny_config(path, parallel=EXPERT_LAYOUTS[layout])
        ranks = config.parallel.world_size
        results.append(run_distributed(ranks, job, config, sequences, folder)[0])
    expected, result = results
    assert result["optimizer_steps"] == 3
    assert (result["logprobs"] - expected).abs().max() < 1e-3


# Ranges of data-parallel ranks begin within rows, gate and up share a matrix, a head is tied.
STATES = {
    "qwen3_tp2_dp2": ("qwen3", {"tp": 2, "dp": 2}),
    "qwen3_dp3_bf16": ("qwen3", {"dp": 3}),
    "tied_pp2_dp2": ("tied", {"pp": 2, "dp": 2}),
    "qwen3_moe_dp4_ep2": ("qwen3_moe", {"dp": 4, "ep": 2}),
    "gpt_oss_tp2_dp2_ep2": ("gpt_oss", {"tp": 2, "dp": 2, "ep": 2}),
    "deepseek_v3_pp2_dp2": ("deepseek_v3", {"pp": 2, "dp": 2}),
}


@pytest.mark.parametrize("case", STATES)
def test_each_rank_saves_its_own_optimizer_state_alone_and_megatron_reads_the_whole(case, tmp_path):
    name, parallel = STATES[case]
    path = tmp_path / "model"
    sizes = {"tie_word_embeddings": True} if name == "tied" else {}
    save_tiny_model(path, name.replace("tied", "qwen3"), **sizes)
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), plain)
    precision = {"train": "bf16" if case.endswith("bf16") else "fp32"}
    config = tiny_config(path, parallel=parallel, precision=precision)
    ranks, folder = config.parallel.world_size, tmp_path / "step_000001"
    sequences = with_old_logprobs(plain, logprobs)
    results = run_distributed(ranks, optimizer_state_job, config, sequences, folder)
    for equal, saved, held in results:
        assert equal
        assert saved == held


@pytest.mark.parametrize(("source", "target"), [("dp2_ep2", "tp2"), ("1", "dp2_ep2")])
def test_a_checkpoint_as_megatron_gathers_it_resumes_too(experts, source, target, tmp_path):
    path, sequences = experts
    folder = tmp_path / "step_000002"
    results = []
    for layout, job in ((source, gathered_save_job), (target, continue_job)):
        config = tiny_config(path, parallel=EXPERT_LAYOUTS[layout])
        ranks = config.parallel.world_size
        results.append(run_distributed(ranks, job, config, sequences, folder)[0])
    expected, result = results
    assert result["optimizer_steps"] == 3
    assert (result["logprobs"] - expected).abs().max() < 1e-3


def test_a_checkpoint_to_which_a_rank_does_not_give_all_is_not_made(model, sequences, tmp_path):
    config, folder = tiny_config(model, parallel={"dp": 2}), tmp_path / "step_000001"
    with pytest.raises(RuntimeError, match=r"of 3 tensors .* first optimizer\.state\.param\."):
        run_distributed(2, incomplete_state_job, config, sequences, folder)
    assert not folder.exists()


def test_sinks_and_biases_of_experts_resume_under_another_layout(tmp_path):
    path, folder = tmp_path / "model", tmp_path / "step_000002"
    save_tiny_model(path, "gpt_oss")
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), plain)
    sequences = with_old_logprobs(plain, logprobs)
    saved = tiny_config(path, parallel={"tp": 2, "etp": 2})
    expected = run_distributed(2, save_job, saved, sequences, folder)[0]
    loaded = tiny_config(path, parallel={"dp": 2, "ep": 2})
    result = run_distributed(2, continue_job, loaded, sequences, folder)[0]
    assert result["optimizer_steps"] == 3
    assert (result["logprobs"] - expected).abs().max() < 1e-3


def test_without_the_distributed_optimizer_another_expert_layout_is_refused(experts, tmp_path):
    path, sequences = experts
    folder, optim = tmp_path / "step_000002", {"lr": 1e-3, "distributed": False}
    saved = tiny_config(path, parallel={"dp": 2, "ep": 2}, optim=optim)
    run_distributed(2, save_job, saved, sequences, folder)
    with pytest.raises(RuntimeError, match=r"ConversionError: .* another number of optimizers"):
        run_distributed(1, continue_job, tiny_config(path, optim=optim), sequences, folder)


def test_a_run_without_the_distributed_optimizer_resumes_too(model, sequences, tmp_path):
    optim = {"lr": 1e-3, "distributed": False}
    config = tiny_config(model, parallel={"dp": 2}, optim=optim)
    folder = tmp_path / "step_000002"
    expected = run_distributed(2, save_job, config, sequences, folder)[0]
    result = run_distributed(2, continue_job, config, sequences, folder)[0]
    assert (result["logprobs"] - expected).abs().max() < 1e-3


LAYOUTS = {
    "tp2": {"parallel": {"tp": 2}},
    "dp2_bf16": {"parallel": {"dp": 2}, "precision": {"train": "bf16"}},
    "dp2_replicated": {"parallel": {"dp": 2}, "optim": {"lr": 1e-3, "distributed": False}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_roll_back_restores_weights_and_moments_bit_by_bit_and_the_schedule_goes_on(
    model, sequences, tmp_path, layout
):
    config = tiny_config(model, **LAYOUTS[layout])
    result = run_distributed(2, roll_back_job, config, sequences, tmp_path)[0]
    saved, restored, third, again = (
        load_file(tmp_path / f"{name}.safetensors")
        for name in ("saved", "restored", "third", "third_again")
    )
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert all(torch.equal(third[name], again[name]) for name in saved)
    assert any(not torch.equal(saved[name], third[name]) for name in saved)
    # Five optimizer steps were made, two of them are in the weights.
    assert result["clock"] == (5, 2)
    assert result["learning_rate"] == 1e-3 * 0.5 * 0.5


# A norm of some 0.1 is clipped to 1e-3: without clipping, Adam's second step would differ.
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_bit_by_bit_that_of_megatron(model, sequences, tmp_path, layout):
    sections = LAYOUTS[layout]
    optim = {"lr": 1e-3, "grad_clip": 1e-3} | sections.get("optim", {})
    config = tiny_config(model, **(sections | {"optim": optim}))
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    result = run_distributed(2, train_job, config, sequences, ours)[0]
    assert min(result["grad_norms"]) > 1e-2
    run_distributed(2, upstream_step_job, config, sequences, theirs)
    ours, theirs = load_file(ours), load_file(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_file_of_another_size_is_named(saved, tmp_path):
    folder, _ = saved
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    name = next(name for name in manifest["files"] if name.endswith(".distcp"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in manifest["files"]:
        (copy / file).parent.mkdir(exist_ok=True)
        (copy / file).write_bytes((folder / file).read_bytes())
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))
    check_checkpoint(copy)
    with (copy / name).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ConversionError, match=f"{name}: expected .* the file has 10 bytes"):
        check_checkpoint(copy)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path):
    with pytest.raises(ConversionError, match="not a complete checkpoint"):
        check_checkpoint(tmp_path)


def test_a_gradient_of_nan_skips_the_step_and_leaves_weights_and_moments(
    model, sequences, tmp_path
):
    config = tiny_config(model, parallel={"tp": 2})
    results = run_distributed(2, broken_step_job, config, sequences, tmp_path)
    # It counts for the schedule of the learning rate, which is constant here.
    assert results == [([None, "gradient norm is nan", None], 3)] * 2
    for one, other in (("before", "after"), ("end", "undisturbed")):
        old, new = load_file(tmp_path / one), load_file(tmp_path / other)
        assert all(torch.equal(old[name], new[name]) for name in old)
