"""Real vLLM in its own process against transformers in this one, with tiny random models."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_cpgd.errors import RolloutError, WeightSyncError
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.engine_group import EngineGroup
from megatron_cpgd.weights.tensor_file import TensorFile
from tests.helpers.engines import (
    CONFIGS,
    MAX_MODEL_LEN,
    PROMPTS,
    SAMPLING,
    TOLERANCE,
    VOCAB,
    logprob_error,
    named_weights,
    start_engine,
    start_lab,
    write_arena,
)
from tests.helpers.full_run import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """One engine per architecture, all loading at the same time."""
    labs = {}
    try:
        for name, config in CONFIGS.items():
            labs[name] = start_lab(tmp_path_factory.mktemp(name), config)
        for lab in labs.values():
            lab.engine.wait_ready()
            lab.cold = lab.generate()
        yield labs
    finally:
        for lab in labs.values():
            lab.engine.close()


@pytest.fixture
def lab(labs):
    """The engine with weights A."""
    lab = labs["qwen3_with_qk_norm"]
    lab.publish("A")
    return lab


@pytest.fixture(params=CONFIGS)
def each_lab(request, labs):
    return labs[request.param]


def test_a_new_engine_has_the_logprobs_of_its_checkpoint(each_lab):
    assert logprob_error(each_lab.models["A"], PROMPTS, each_lab.cold) < TOLERANCE
    assert {rollout.weight_version for group in each_lab.cold for rollout in group} == {0}


def test_refreshed_weights_have_the_logprobs_of_transformers(each_lab):
    version = each_lab.publish("B")
    groups = each_lab.generate()
    assert logprob_error(each_lab.models["B"], PROMPTS, groups) < TOLERANCE
    assert logprob_error(each_lab.models["A"], PROMPTS, groups) > 0.1
    assert {rollout.weight_version for group in groups for rollout in group} == {version}


def test_refresh_there_and_back_equals_the_cold_start_bit_by_bit(each_lab):
    each_lab.publish("B")
    each_lab.publish("A")
    groups = each_lab.generate()
    cold = each_lab.cold
    assert [[r.logprobs for r in g] for g in groups] == [[r.logprobs for r in g] for g in cold]


def test_logprobs_are_those_of_the_sampling_temperature(lab):
    groups = lab.generate(Sampling(n=2, max_tokens=12, temperature=0.7, seed=1))
    assert logprob_error(lab.models["A"], PROMPTS, groups, temperature=0.7) < TOLERANCE
    assert logprob_error(lab.models["A"], PROMPTS, groups) > 0.1


def test_logprobs_are_renormalised_over_the_top_k(lab):
    # With k = 1 the only candidate has probability 1.
    groups = lab.generate(Sampling(max_tokens=4, top_k=1))
    assert [logprob for (rollout,) in groups for logprob in rollout.logprobs] == [0.0] * 16


def test_greedy_takes_the_most_likely_token(lab):
    (rollout,) = lab.generate(Sampling(temperature=0, max_tokens=1), prompts=PROMPTS[:1])[0]
    with torch.no_grad():
        best = lab.models["A"](torch.tensor(PROMPTS[:1])).logits[0, -1].argmax().item()
    assert rollout.token_ids == [best]


def test_a_seed_fixes_the_tokens_and_another_changes_them(lab):
    def tokens(seed):
        groups = lab.generate(Sampling(n=2, max_tokens=12, seed=seed))
        return [rollout.token_ids for group in groups for rollout in group]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


def test_equal_prompts_of_one_call_get_different_responses(lab):
    groups = lab.generate(Sampling(n=2, max_tokens=12, seed=5), prompts=[[3, 4]] * 4)
    assert len({tuple(rollout.token_ids) for group in groups for rollout in group}) == 8


def test_response_i_of_a_seeded_prompt_uses_seed_plus_i(lab):
    # Children of seed 40 are streams 40, 41, 42, whatever else is in the batch.
    (group, _) = lab.generate(Sampling(n=3, max_tokens=12), PROMPTS[:2], seeds=[40, 90])
    alone = lab.generate(Sampling(max_tokens=12), PROMPTS[:1] * 3, seeds=[40, 41, 42])
    assert [r.token_ids for r in group] == [r.token_ids for (r,) in alone]


def test_a_stop_token_ends_the_response_and_is_part_of_it(lab):
    free = lab.generate()[0][0]
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    sampling = Sampling(n=2, max_tokens=12, seed=5, stop_token_ids=[stop])
    stopped = lab.generate(sampling)[0][0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert len(stopped.logprobs) == first + 1
    assert stopped.finish_reason == "stop"


def test_only_the_given_end_tokens_end_a_response(lab):
    # The model's generation config calls 1 an end token; 512 draws of 67 tokens contain it.
    groups = lab.generate(Sampling(n=8, max_tokens=64, seed=3))
    rollouts = [rollout for group in groups for rollout in group]
    assert any(1 in rollout.token_ids[:-1] for rollout in rollouts)
    assert {len(rollout.token_ids) for rollout in rollouts} == {64}
    assert {rollout.finish_reason for rollout in rollouts} == {"length"}


def test_a_long_prompt_that_was_cached_is_computed_anew_after_a_refresh(lab):
    # vLLM on CPU caches blocks of 128 tokens: this prompt fills one.
    prompts = [[(7 * i) % VOCAB for i in range(200)]]
    assert logprob_error(lab.models["A"], prompts, lab.generate(prompts=prompts)) < TOLERANCE
    lab.publish("B")
    assert logprob_error(lab.models["B"], prompts, lab.generate(prompts=prompts)) < TOLERANCE


def test_no_prompts_give_no_responses(lab):
    assert lab.generate(prompts=[]) == []


def test_responses_of_a_version_that_the_engine_does_not_hold_are_refused(lab):
    with pytest.raises(RolloutError, match=f"version {lab.version + 1}, the engine holds"):
        lab.engine.generate(PROMPTS, SAMPLING, version=lab.version + 1)
    assert lab.generate()[0][0].weight_version == lab.version


def test_routes_of_an_engine_that_was_not_started_for_them_are_refused(lab):
    with pytest.raises(RolloutError, match="the engine was started without return_routes"):
        lab.generate(Sampling(max_tokens=1, return_routes=True))
    assert len(lab.generate()) == len(PROMPTS)


def test_an_unknown_token_is_refused_and_the_engine_lives_on(lab):
    with pytest.raises(RolloutError, match=f"prompt 2 contains token id {VOCAB}"):
        lab.generate(prompts=[[1], [2], [3, VOCAB]])
    assert len(lab.generate()) == len(PROMPTS)


def test_a_prompt_too_long_for_the_engine_is_refused(lab):
    with pytest.raises(RolloutError, match=f"prompt 0 has {MAX_MODEL_LEN} tokens"):
        lab.generate(prompts=[[1] * MAX_MODEL_LEN])


def assert_refused_and_healed(lab, error: str, arena: Path) -> None:
    """The refresh fails with `error`, nothing is generated, and the next good one repairs it."""
    with pytest.raises(WeightSyncError, match=error):
        lab.engine.refresh(arena, lab.version + 1)
    with pytest.raises(WeightSyncError, match="the last weight refresh failed: "):
        lab.generate()
    lab.publish("A")
    groups = lab.generate()
    assert [[r.logprobs for r in g] for g in groups] == [[r.logprobs for r in g] for g in lab.cold]


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_missing_tensor_is_named_and_a_good_refresh_heals_the_engine(lab, tmp_path, name):
    weights = named_weights(lab.models["B"])
    del weights[name]
    assert_refused_and_healed(
        lab, rf"missing \['{name}'\]", write_arena(tmp_path / "arena", weights)
    )


def test_an_unknown_tensor_is_named(lab, tmp_path):
    weights = named_weights(lab.models["B"]) | {"model.layers.9.mlp.bias": torch.zeros(4)}
    arena = write_arena(tmp_path / "arena", weights)
    assert_refused_and_healed(lab, r"unknown \['model.layers.9.mlp.bias'\]", arena)


def test_an_arena_that_is_not_there_is_named(lab, tmp_path):
    assert_refused_and_healed(lab, "nowhere: cannot open the file", tmp_path / "nowhere")


def test_a_version_below_that_of_the_engine_is_refused(lab):
    with pytest.raises(WeightSyncError, match="versions only grow"):
        lab.engine.refresh(lab.arena, lab.version - 1)
    lab.publish("A")


def prepare(assets: Path, folder: Path) -> Callable[[], "subprocess.CompletedProcess[str]"]:
    """The checks that need vLLM's objects; the script explains each."""
    return lambda: subprocess.run(
        [sys.executable, "-m", "tests.e2e.inside_engine_process"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def test_inside_the_engine_process(prepared):
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr


def test_an_engine_that_dies_while_loading_is_reported_with_its_log(tmp_path, monkeypatch):
    broken_python = tmp_path / "python"
    broken_python.write_text("#!/bin/sh\necho cannot load libcuda\nexit 3\n")
    broken_python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken_python))
    engine = start_engine(tmp_path)
    try:
        with pytest.raises(RolloutError, match=r"(?s)exit code 3; .*cannot load libcuda"):
            engine.wait_ready()
    finally:
        engine.close()


def test_an_engine_over_its_deadline_is_killed(labs):
    engine = start_engine(labs["llama"].arena.parent, start_timeout_s=0.5)
    try:
        with pytest.raises(RolloutError, match=r"no answer from the engine within 0\.5 s"):
            engine.wait_ready()
        assert is_gone(engine.pid)
    finally:
        engine.close()


ORPHAN_MAKER = """
import os, signal, sys
from pathlib import Path
from megatron_cpgd.rollout.vllm_engine import VllmEngine
engine = VllmEngine(
    Path(sys.argv[1]), dtype="fp32", max_model_len=64, engine_args={}, start_timeout_s=60,
    step_timeout_s=60, log_path=None, seed=0,
)
print(engine.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_engine_does_not_outlive_a_trainer_that_was_killed(tmp_path):
    command = [sys.executable, "-c", ORPHAN_MAKER, str(tmp_path)]
    # Nobody is left to remove its temporary folder.
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    trainer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.returncode == -signal.SIGKILL
    engine = int(trainer.stdout)
    deadline = time.monotonic() + 60
    while not is_gone(engine) and time.monotonic() < deadline:
        time.sleep(0.1)
    survived = not is_gone(engine)
    if survived:
        os.kill(engine, signal.SIGKILL)
    assert not survived


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.slow
def test_tensor_parallel_workers_each_read_their_part_of_the_arena(labs):
    lab = labs["llama"]
    split = {"kv_cache_memory_bytes": 32 << 20, "tensor_parallel_size": 2}
    engine = start_engine(lab.arena.parent, engine_args=split)
    try:
        arena = write_arena(lab.arena.parent / "arena_of_b", named_weights(lab.models["B"]))
        engine.refresh(arena, 1)
        groups = engine.generate(PROMPTS, SAMPLING, version=1)
        assert logprob_error(lab.models["B"], PROMPTS, groups) < TOLERANCE
    finally:
        engine.close()


def test_two_engines_sample_what_one_does_and_get_the_same_weights(labs):
    lab = labs["llama"]
    second = start_engine(lab.arena.parent)
    try:
        version = lab.publish("B")
        alone = lab.generate()
        group = EngineGroup([lab.engine, second])
        report = group.refresh(lab.arena, version)
        assert report.fingerprints == TensorFile.open(lab.arena).fingerprints()
        together = group.generate(PROMPTS, SAMPLING, version=version)
    finally:
        second.close()
    assert [[r.token_ids for r in each] for each in together] == [
        [r.token_ids for r in each] for each in alone
    ]
    assert logprob_error(lab.models["B"], PROMPTS, together) < TOLERANCE


def test_closing_an_engine_ends_a_call_of_another_thread(labs):
    """One of the last of this file: it uses up an engine, as the next one does."""
    lab = labs["qwen2_tied_with_qkv_bias"]
    errors: list[Exception] = []

    def generate() -> None:
        try:
            lab.generate(Sampling(n=64, max_tokens=200), prompts=PROMPTS * 16)
        except RolloutError as error:
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    time.sleep(0.3)
    start = time.monotonic()
    lab.engine.close()
    thread.join(60)
    assert time.monotonic() - start < 30, "it waited for the step's time limit of 120 s"
    assert "generating: the engine was killed" in str(errors[0])


def test_an_engine_killed_while_it_sleeps_is_reported_at_the_next_refresh(labs):
    """It uses up the engine."""
    lab = labs["qwen3_with_qk_norm"]
    lab.engine.sleep()
    with pytest.raises(WeightSyncError, match="the engine sleeps and has no weights; refresh it"):
        lab.generate()
    os.kill(lab.engine.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match="refreshing: the engine was killed by SIGKILL"):
        lab.publish("A")


def test_an_engine_killed_while_generating_is_reported_at_once(labs):
    """Last of this file: it uses up the engine."""
    lab = labs["llama"]
    threading.Timer(0.3, os.kill, (lab.engine.pid, signal.SIGKILL)).start()
    start = time.monotonic()
    with pytest.raises(RolloutError, match="generating: the engine was killed by SIGKILL"):
        lab.generate(Sampling(n=64, max_tokens=200), prompts=PROMPTS * 16)
    assert time.monotonic() - start < 30, "it waited for the step's time limit of 120 s"
    with pytest.raises(RolloutError, match="killed by SIGKILL"):
        lab.generate()
    lab.engine.close()
    with pytest.raises(RolloutError, match="the engine was closed"):
        lab.generate()
