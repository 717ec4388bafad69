"""Engine and trainer take turns on one GPU: `pytest -m gpu`. Not yet run on a GPU."""

import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.vllm_engine import has_cpu_build
from tests.helpers.engines import CONFIGS, PROMPTS, logprob_error, start_lab
from tests.helpers.plan_jobs import held_bytes
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import GPU_SIZES, save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.gpu

GIB = 2**30


def test_what_leaves_the_gpu_frees_its_memory_and_comes_back_bit_by_bit(tmp_path):
    save_tiny_model(tmp_path, "qwen2", **GPU_SIZES)
    policy = build_policy(
        tiny_config(
            tmp_path, precision={"train": "bf16"}, rollout={"sleep": True},
            optim={"lr": 1e-3, "offload": True},
        )
    )  # fmt: skip
    sequences = tiny_sequences()
    with_old_logprobs(sequences, policy.compute_logprobs(sequences))
    policy.train_step(sequences, OBJECTIVE)
    expected = torch.cat(policy.compute_logprobs(sequences))
    held, here = held_bytes(policy), torch.cuda.memory_allocated()
    policy.release()
    freed = here - torch.cuda.memory_allocated()
    assert freed >= held.weights + held.gradients + held.optimizer > 0
    assert torch.cuda.memory_reserved() < here
    assert all(piece.is_pinned() for piece in policy._state._host)
    policy.reload()
    assert held_bytes(policy) == held
    assert torch.equal(torch.cat(policy.compute_logprobs(sequences)), expected)


@pytest.mark.skipif(has_cpu_build(), reason="the installed vLLM computes on the CPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_that_sleeps_frees_its_memory_and_wakes_with_the_weights_of_the_refresh(
    name, tmp_path
):
    share = {"gpu_memory_utilization": 0.5, "enforce_eager": False}
    lab = start_lab(tmp_path, CONFIGS[name], engine_args=share)
    try:
        lab.engine.wait_ready()
        free, total = torch.cuda.mem_get_info()
        lab.engine.sleep()
        asleep = torch.cuda.mem_get_info()[0]
        assert asleep - free > 0.4 * total
        print(f"asleep the engine keeps {(total - asleep) / GIB:.1f} GiB, this process included")
        with pytest.raises(WeightSyncError, match="the engine sleeps"):
            lab.generate()
        for which in ("B", "A"):
            lab.publish(which)
            groups = lab.generate(Sampling(n=2, max_tokens=12, seed=5))
            assert logprob_error(lab.models[which], PROMPTS, groups) < 0.05  # TF32
            lab.engine.sleep()
    finally:
        lab.engine.close()
