"""Real worker processes that hang, raise and die."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from megatron_cpgd.config.schema import ExactMatchReward, FormatReward, MathReward, PythonReward
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rewards.base import RewardRequest
from megatron_cpgd.rewards.pool import RewardPool
from megatron_cpgd.rewards.worker import score_chunk

USER_REWARDS = """
import ctypes, os, signal, sys, time

def act(response, answer, fields):
    if response == "sleep":
        time.sleep(60)
    if response == "swallow":
        try:
            time.sleep(60)
        except Exception:
            return 1.0
    if response == "deaf":  # C code that does not return to Python for hours
        sum(range(10**13))
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(1)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "nan":
        return float("nan")
    if response == "none":
        return None
    if response == "alarm":  # a library with a timer of its own, such as math-verify's defaults
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.alarm(0)
    if response == "slow":
        time.sleep(0.2)
    if response == "oom_score":
        return float(open("/proc/self/oom_score_adj").read())
    if response == "pid":
        return os.getpid()
    return float(fields.get("value", 1.0))

def hang(response, answer, fields):
    with open(answer, "a") as file:
        file.write(f"{os.getpid()}\\n")
    while True:
        time.sleep(0.05)
"""
ACT = PythonReward(type="python", path="user_rewards_faults.act")


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "user_rewards_faults.py").write_text(USER_REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def requests(*responses, answer=None):
    return [RewardRequest(response=response, answer=answer) for response in responses]


def open_pool(*functions, workers=2, timeout_s=0.5):
    return closing(RewardPool(functions, workers=workers, timeout_s=timeout_s))


def test_total_is_the_weighted_sum_of_the_columns():
    functions = [
        ExactMatchReward(type="exact_match", weight=1.0),
        FormatReward(type="format", weight=0.5, pattern="[0-9]+"),
    ]
    with open_pool(*functions) as pool:
        result = pool.score(requests("7", "8", "x", answer="7"))
    assert result.columns == {"exact_match": [1.0, 0.0, 0.0], "format": [1.0, 1.0, 0.0]}
    assert result.total == [1.5, 0.5, 0.0]  # 1 * exact + 0.5 * format
    assert (result.timeouts, result.errors) == (0, 0)


def test_results_keep_the_order_of_many_requests():
    batch = [RewardRequest(response="", answer=None, fields={"value": i}) for i in range(300)]
    with open_pool(ACT) as pool:
        assert pool.score(batch).total == [float(i) for i in range(300)]


def test_empty_batch_gives_empty_columns():
    with open_pool(ACT) as pool:
        assert pool.score([]).columns == {"act": []}


@pytest.mark.parametrize("fault", ["sleep", "swallow"])
def test_call_over_the_limit_scores_zero_and_keeps_its_worker(fault):
    with open_pool(ACT, workers=1) as pool:
        before = pool.score(requests("pid")).total
        result = pool.score(requests("ok", fault, "ok", "ok", "ok"))
        assert result.total == [1.0, 0.0, 1.0, 1.0, 1.0]
        assert (result.timeouts, result.errors) == (1, 0)
        assert pool.score(requests("pid")).total == before


def test_hostile_tower_of_powers_ends_by_the_timeout():
    with open_pool(MathReward(type="math"), timeout_s=2.0) as pool:
        result = pool.score(
            requests(r"\boxed{9^{9^{9^9}}}", r"\boxed{3}", r"\boxed{4}", answer="3")
        )
    assert result.total == [0.0, 1.0, 0.0]
    assert (result.timeouts, result.errors) == (1, 0)


def test_regular_expression_that_backtracks_for_ever_ends_by_the_timeout():
    with open_pool(FormatReward(type="format", pattern="(a+)+b")) as pool:
        result = pool.score(requests("a" * 40, "ab"))
    assert result.total == [0.0, 1.0]
    assert result.timeouts == 1


def test_call_that_no_timer_reaches_is_killed_and_its_neighbours_score():
    with open_pool(ACT) as pool:
        started = time.monotonic()
        result = pool.score(requests(*["ok"] * 10, "deaf", *["ok"] * 10))
        assert time.monotonic() - started < 8.0  # killed twice: in its chunk, then alone
        assert result.total == [1.0] * 10 + [0.0] + [1.0] * 10
        assert (result.timeouts, result.errors) == (1, 0)
        assert pool.score(requests("ok")).total == [1.0]


@pytest.mark.parametrize("fault", ["exit", "segfault"])
def test_call_that_kills_its_worker_scores_zero_and_the_pool_lives_on(fault):
    with open_pool(ACT) as pool:
        result = pool.score(requests(*["ok"] * 10, fault, *["ok"] * 10))
        assert result.total == [1.0] * 10 + [0.0] + [1.0] * 10
        # The pool may see a death only by its silence, then it counts as a timeout.
        assert result.timeouts + result.errors == 1
        assert pool.score(requests("ok", "ok")).total == [1.0, 1.0]


def test_many_deaths_in_one_batch_are_all_counted():
    with open_pool(ACT) as pool:
        result = pool.score(requests(*["exit", "ok"] * 12))
    assert result.total == [0.0, 1.0] * 12
    assert result.timeouts + result.errors == 12


def test_workers_killed_between_two_batches_are_replaced():
    with open_pool(ACT) as pool:
        pids = {int(pid) for pid in pool.score(requests(*["pid"] * 20)).total}
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        assert pool.score(requests(*["ok"] * 20)).total == [1.0] * 20


@pytest.mark.parametrize("fault", ["raise", "nan", "none", "sys.exit"])
def test_failing_call_scores_zero_and_is_logged_once(fault, caplog):
    with open_pool(ACT) as pool, caplog.at_level(logging.WARNING):
        first = pool.score(requests("ok", fault))
        second = pool.score(requests("ok", fault))
    assert first.total == second.total == [1.0, 0.0]
    assert (first.timeouts, first.errors) == (0, 1)
    (record,) = caplog.records
    assert "'act' failed on 1 of 2" in record.getMessage()
    if fault == "raise":
        assert "KeyError: 'no such thing'" in record.getMessage()
        assert "in act" in record.getMessage()


def test_function_that_fails_on_the_whole_batch_stops_the_run():
    with open_pool(ACT) as pool, pytest.raises(RuntimeError, match=r"(?s)'act'.*no such thing"):
        pool.score(requests("raise", "raise", "raise"))


def test_batch_of_timeouts_alone_does_not_stop_the_run():
    with open_pool(ACT, timeout_s=0.2) as pool:
        assert pool.score(requests("sleep", "sleep")).timeouts == 2


def test_timer_survives_a_call_that_replaces_it():
    with open_pool(ACT, workers=1) as pool:
        before = pool.score(requests("pid")).total
        result = pool.score(requests("alarm", "sleep"))
        assert pool.score(requests("pid")).total == before  # ended by the timer, not by a kill
    assert result.total == [1.0, 0.0]
    assert result.timeouts == 1


def test_slow_calls_are_each_within_the_limit_though_their_chunk_is_not():
    # 16 calls of 0.2 s, chunks of 4: one chunk outlasts the limit of 0.5 s, no call does.
    with open_pool(ACT, workers=1) as pool:
        result = pool.score(requests(*["slow"] * 16))
    assert result.total == [1.0] * 16
    assert result.timeouts == 0


def test_chunk_stops_early_so_that_slow_calls_do_not_get_its_worker_killed():
    outcomes = score_chunk(ACT, requests(*["slow"] * 20), 5.0)
    # A call starts at 0, 0.2 and 0.4 s, the next would start after the budget of 0.5 s.
    assert [outcome.value for outcome in outcomes] == [1.0] * len(outcomes)
    assert 1 <= len(outcomes) <= 3


def test_kernel_prefers_to_kill_a_worker_when_memory_runs_out():
    with open_pool(ACT) as pool:
        assert pool.score(requests("oom_score")).total == [1000.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PythonReward(type="python", path="user_rewards_gone.f"), "no module 'user_rewards_gone'"),
        (PythonReward(type="python", path="user_rewards_faults.f"), "no attribute 'f'"),
        (FormatReward(type="format", pattern="["), "not a regular expression"),
    ],
)
def test_wrong_setting_is_reported_at_construction(config, message):
    with pytest.raises(ConfigError, match=message):
        RewardPool([ACT, config], workers=1, timeout_s=1.0)


def test_module_that_ends_its_process_is_reported_at_construction(tmp_path):
    (tmp_path / "user_rewards_exit.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(ConfigError, match="ends the worker"):
        RewardPool(
            [PythonReward(type="python", path="user_rewards_exit.f")], workers=1, timeout_s=1.0
        )


def test_512_cheap_calls_take_less_than_300_ms():
    batch = requests(*["x" * 2000] * 512, answer="x" * 2000)
    with open_pool(ExactMatchReward(type="exact_match")) as pool:
        pool.score(batch)
        # One quiet moment is enough: on a busy machine most calls wait for a core.
        assert any(_seconds(lambda: pool.score(batch)) < 0.3 for _ in range(30))


def _seconds(call):
    started = time.monotonic()
    call()
    return time.monotonic() - started


def test_workers_do_not_load_torch():
    # It would cost each worker seconds to start and hundreds of megabytes.
    script = "import sys, megatron_cpgd.rewards.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=_environment()).returncode == 0


@pytest.mark.parametrize("end", ["raise", "kill"])
def test_no_worker_outlives_its_parent(tmp_path, end):
    pids_file = tmp_path / "pids"
    script = (
        "import threading, time\n"
        "from pathlib import Path\n"
        "from megatron_cpgd.config.schema import PythonReward\n"
        "from megatron_cpgd.rewards.base import RewardRequest\n"
        "from megatron_cpgd.rewards.pool import RewardPool\n"
        "if __name__ == '__main__':\n"
        "    config = PythonReward(type='python', path='user_rewards_faults.hang')\n"
        "    pool = RewardPool([config], workers=1, timeout_s=2)\n"
        f"    path = {str(pids_file)!r}\n"
        "    request = RewardRequest(response='', answer=path)\n"
        "    threading.Thread(target=pool.score, args=([request],), daemon=True).start()\n"
        "    while not Path(path).exists():\n"
        "        time.sleep(0.02)\n"
        f"    {'raise SystemExit(1)' if end == 'raise' else 'time.sleep(60)'}\n"
    )
    process = _run_script(tmp_path, script)
    _wait_for(lambda: pids_file.exists() and pids_file.read_text(), 120)  # imports
    if end == "kill":
        process.kill()
    process.communicate(timeout=30)
    pid = int(pids_file.read_text())
    _wait_for(lambda: not os.path.exists(f"/proc/{pid}"), 30)


def _run_script(folder, text):
    (folder / "main_script.py").write_text(text)
    return subprocess.Popen(
        [sys.executable, str(folder / "main_script.py")], env=_environment(), text=True
    )


def _environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}


def _wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
