"""Runs of one process that share an engine: `python -m tests.helpers.many_runs ASSETS OUT`."""

import os
import shutil
import sys
import threading
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_cpgd.errors import RolloutError, RunStopped
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.stop_request import StopRequest
from tests.helpers.full_run import settings, write_yaml

DAPO = {
    "preset": "dapo",
    "clip": {"type": "constant", "low": 0.2, "high": 0.28},
    "filter": {"truncated": "mask"},
}
RUNS: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "stale": {"rollout": {"staleness": 2}},
    "stale_interrupted": {"rollout": {"staleness": 2}},
    "overlapped": {"rollout": {"staleness": 2, "overlap": True}},
    "overlapped_stopped": {"rollout": {"staleness": 2, "overlap": True}},
    "in_place_interrupted": {"rollout": {"staleness": 2, "overlap": True, "sync": "in_place"}},
    "dapo": {"algorithm": DAPO},
    "dapo_interrupted": {"algorithm": DAPO},
    "pieces": {"rollout": {"piece_tokens": 2}},
    "pieces_interrupted": {"rollout": {"piece_tokens": 2}},
    "nothing_left": {
        "rewards": {"functions": [{"type": "format", "pattern": ".*"}]},
        "algorithm": {"filter": {"max_batches": 2}},
    },
    "stale_sampler": {"rollout": {"staleness": 2}, "algorithm": {"old_policy": "sampler"}},
}
STOPPED_AFTER = 5
"""Step behind which every `*_interrupted` was broken off once; the last checkpoint is at 4."""


def main(assets: Path, out: Path) -> None:
    """Every run of RUNS in `out/<name>`."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"
    )
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_cpgd import train as loop
    from megatron_cpgd.config.load import load_config
    from megatron_cpgd.policy.parallel import join_world
    from megatron_cpgd.rollout.reused_engine import ReusedEngine
    from megatron_cpgd.rollout.start import start_engine

    configs = {}
    for name, changes in RUNS.items():
        content = settings(assets)
        content["parallel"]["tp"] = 1
        content["run"]["dir"] = str(out / name)
        for section, values in changes.items():
            content[section] |= values
        configs[name] = load_config(write_yaml(out / f"{name}.yaml", content))
    engine = ReusedEngine(start_engine(configs["first"], out / "engine.log"))
    try:
        join_world(timedelta(minutes=5))
        log_step = loop.log_step
        for name, config in configs.items():
            if name.endswith("_interrupted"):
                engine.begin_run()
                loop.log_step = _broken_off  # type: ignore[assignment]
                try:
                    loop.train(config, engine)
                except BrokenOffError:
                    loop.log_step = log_step
            engine.begin_run()
            if name.endswith("_stopped"):
                stop = StopRequest()
                with suppress(RunStopped):
                    loop.train(config, HangingEngine(engine, stop), stop)
                shutil.copy(out / name / "metrics.jsonl", out / f"{name}.jsonl")
                engine.begin_run()
            loop.train(config, engine)
    finally:
        engine.close()


class HangingEngine:
    """An engine whose fifth batch takes for ever; then the time to stop has come."""

    def __init__(self, engine: Any, stop: StopRequest) -> None:
        self._engine, self._stop = engine, stop
        self._batches = 0
        self._closed = threading.Event()

    def generate(self, prompts: Any, sampling: Sampling, **others: Any) -> Any:
        self._batches += sampling.n > 1  # else it evaluates
        if self._batches == 5:
            self._stop.asked, self._stop.late_at = True, 0.0
            self._closed.wait()
            raise RolloutError("closed")
        return self._engine.generate(prompts, sampling, **others)

    def close(self) -> None:
        self._closed.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class BrokenOffError(Exception):
    """What ends a run early."""


def _broken_off(run: Any, step: int, metrics: dict[str, Any]) -> None:
    from megatron_cpgd.run import log_step

    if step == STOPPED_AFTER:
        raise BrokenOffError
    log_step(run, step, metrics)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
