import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine import Sampling, check_prompts, stream_seeds
from megatron_cpgd.rollout.messages import Failed, Generate, Generated, Request, Response
from megatron_cpgd.rollout.vllm_engine import engine_environment
from megatron_cpgd.types import Rollout


def test_no_two_responses_of_a_batch_share_a_random_stream():
    # Response i of prompt p draws from 10 + 3 p + i: 10 11 12 | 13 14 15.
    assert stream_seeds(Sampling(n=3, max_tokens=1, seed=10), 2, None) == [10, 13]


def test_seeds_of_the_caller_replace_the_seed_of_the_sampling():
    assert stream_seeds(Sampling(max_tokens=1, seed=10), 2, [7, 8]) == [7, 8]


def test_without_a_seed_the_engine_draws_freely():
    assert stream_seeds(Sampling(max_tokens=1), 2, None) is None


def test_one_seed_for_two_prompts_is_refused():
    with pytest.raises(ValueError, match="1 seeds for 2 prompts"):
        stream_seeds(Sampling(max_tokens=1), 2, [7])


@pytest.mark.parametrize("bad", [{"n": 0}, {"max_tokens": 0}, {"temperature": -0.1}])
def test_sampling_out_of_bounds_is_refused(bad):
    with pytest.raises(ValueError, match="at least"):
        Sampling(**({"max_tokens": 1} | bad))


def test_several_greedy_responses_are_refused_because_they_are_equal():
    with pytest.raises(ValueError, match="greedy decoding gives 4 equal responses"):
        Sampling(n=4, temperature=0, max_tokens=1)


def check(prompts):
    check_prompts(prompts, max_tokens=4, vocab_size=10, max_model_len=8)


def test_prompts_that_fit_exactly_are_accepted():
    check([[0, 9], [1, 2, 3, 4]])  # 4 + 4 = 8 tokens; ids 0 and 9 are the first and the last


@pytest.mark.parametrize("token", [10, -1])
def test_an_id_outside_the_vocabulary_is_refused_with_its_prompt(token):
    with pytest.raises(RolloutError, match=f"prompt 1 contains token id {token}, .* 0 to 9"):
        check([[1], [2, token]])


def test_a_prompt_without_room_for_its_response_is_refused():
    with pytest.raises(RolloutError, match=r"prompt 0 has 5 tokens and may get 4 more, .* 8"):
        check([[1, 1, 1, 1, 1]])


def test_an_empty_prompt_is_refused():
    with pytest.raises(RolloutError, match="prompt 2 is empty"):
        check([[1], [1], []])


def test_messages_survive_the_wire():
    sampling = Sampling(n=2, temperature=0.7, max_tokens=5, stop_token_ids=[3], seed=1)
    request = Generate(prompts=[[1, 2]], sampling=sampling, seeds=None, version=4)
    rollout = Rollout(
        token_ids=[5, 3], logprobs=[-0.1, -2.5], finish_reason="stop", weight_version=4
    )
    response = Generated(groups=[[rollout, rollout]])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=Request) == request
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(response), type=Response) == response


def test_an_unknown_error_kind_is_refused_on_the_wire():
    with pytest.raises(msgspec.ValidationError):
        data = msgspec.msgpack.encode(Failed(kind="other", message=""))
        msgspec.msgpack.decode(data, type=Response)


def test_the_engine_does_not_inherit_its_place_among_the_trainers():
    trainer = {
        "PATH": "/bin",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node1",
        "TORCHELASTIC_RUN_ID": "x",
        "GROUP_RANK": "0",
        "ROLE_NAME": "default",
    }
    assert engine_environment(trainer, cpu=False).keys() & trainer.keys() == {"PATH"}


def test_variables_of_the_user_win_over_the_defaults_of_the_engine():
    environment = engine_environment({"OMP_NUM_THREADS": "16"}, cpu=True)
    assert environment["OMP_NUM_THREADS"] == "16"
    assert environment["OMP_WAIT_POLICY"] == "passive"


def test_cpu_settings_stay_away_from_a_gpu_engine():
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in engine_environment({}, cpu=False)


def test_a_rank_imports_neither_vllm_nor_at_its_start_matplotlib():
    script = "import sys, megatron_cpgd.train; print(*sys.modules.keys() & {'vllm', 'matplotlib'})"
    assert subprocess.check_output([sys.executable, "-c", script]) == b"\n"


CHILD = """
import os, sys, time
from megatron_cpgd.rollout.lifetime import end_with_parent
end_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())])
time.sleep(60)
"""


def test_a_process_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_gone(child, 30.0)


def test_a_process_whose_parent_is_gone_already_does_not_start():
    wrong_parent = "1"
    result = subprocess.run(
        [sys.executable, "-c", CHILD, wrong_parent], capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "process 1, which started this one, is gone" in result.stderr


def wait_gone(pid: int, limit_s: float) -> bool:
    """Whether the process ends in time; a survivor is killed, so that a failure leaves nothing."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False
