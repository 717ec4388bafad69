"""A tiny model with data, and the real command line on it: ranks, engine and reward workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

ROOT = Path(__file__).parents[2]
_LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
ENVIRONMENT = {
    **{name: text for name, text in os.environ.items() if name not in _LAUNCHER_NAMES},
    "PYTHONPATH": str(ROOT),
}
"""Of every command, as it was at the start: a test may change its own while others' runs begin."""


def write_assets(folder: Path, experts: int = 0) -> Path:
    """model/ with random weights, train.jsonl (24 problems) and heldout.jsonl (8).

    Args:
        experts: of each layer; 0: the model is dense.
    """
    from megatron_cpgd.demo.arithmetic import split_problems
    from megatron_cpgd.demo.tokenizer import build_tokenizer
    from megatron_cpgd.demo.warmup import build_model

    tokenizer = build_tokenizer(max_length=64)
    build_model(tokenizer, seed=0, experts=experts).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    problems = split_problems(random.Random(0), train=24, heldout=8, hard_share=0.5)
    for name, part in (("train", problems.train), ("heldout", problems.heldout)):
        rows = [{"prompt": p.prompt, "answer": str(p.answer)} for p in part]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def write_moe_model(folder: Path, name: str, build_config: Callable[..., Any]) -> None:
    """A random mixture of experts in folder/name, whose routers move the log-probs; with the
    tokenizer of folder/model."""
    import torch
    from transformers import AutoTokenizer
    from transformers.models.auto import AutoModelForCausalLM

    from tests.helpers.engines import correction_biases

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = build_config(
        vocab_size=len(tokenizer),
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for bias in correction_biases(model).values():
        bias.normal_(0, 0.1)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


def settings(assets: Path) -> dict[str, Any]:
    """A run of 6 steps that uses every part of the system; `run.dir` is to be added.

    A response is rewarded for beginning with a digit: a random model does so now and then.
    """
    return {
        "run": {"steps": 6},
        "model": {"path": str(assets / "model")},
        "parallel": {"tp": 2},
        "precision": {"train": "fp32"},
        "data": {"path": str(assets / "train.jsonl"), "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_response_tokens": 8},
        "rewards": {"workers": 1, "functions": [{"type": "format", "pattern": "[0-9].*"}]},
        "algorithm": {
            "mini_batches": 2,
            "epochs": 2,
            "clip": {"type": "tight_to_loose"},
            "reference": {"coef": 0.01},
        },
        "optim": {"lr": 1e-2},
        "eval": {"every": 3, "sets": {"heldout": {"path": str(assets / "heldout.jsonl")}}},
        "checkpoint": {"every": 2, "export_every": 2, "keep": 9},
        "tracking": {"rollouts_per_step": 32},
    }


def write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a configuration file."""
    path.write_text(yaml.safe_dump(dict(content)))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a .jsonl file; none if it is not there yet."""
    if not path.exists():
        return []
    *lines, _ = path.read_text().split("\n")  # the last one may still be in the making
    return [json.loads(line) for line in lines]


@dataclass(slots=True)
class Finished:
    """What a command left."""

    code: int
    out: str
    err: str
    seconds: float


class Command:
    """`megatron-cpgd ...` in its own session; all processes that descend from it can be found."""

    def __init__(self, *arguments: object, folder: Path, **environment: str) -> None:
        """
        Args:
            folder: for its output; also the working directory.
        """
        self._mark = f"MEGATRON_CPGD_TEST={uuid.uuid4()}"
        name, _, value = self._mark.partition("=")
        self._files = [folder / f"{value}.out", folder / f"{value}.err"]
        self._start = time.monotonic()
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_cpgd.cli", *map(str, arguments)],
                env={**ENVIRONMENT, name: value, **environment},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    @property
    def pid(self) -> int:
        """Of the launcher."""
        return self._process.pid

    def processes(self) -> dict[int, str]:
        """Command lines of all processes that were started by this command and still run."""
        return {
            pid: _read(pid, "cmdline").replace("\0", " ")
            for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*"))
            if self._mark in _read(pid, "environ").split("\0")
        }

    def engine(self) -> int:
        """Process id of the engine."""
        [pid] = [pid for pid, line in self.processes().items() if "vllm_server" in line]
        return pid

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        [pid] = [
            pid
            for pid, line in self.processes().items()
            if "megatron_cpgd.cli train" in line
            and f"RANK={number}" in _read(pid, "environ").split("\0")
        ]
        return pid

    def runs(self) -> bool:
        """Whether the launcher has not ended yet."""
        return self._process.poll() is None

    def wait(self, timeout_s: float = 300) -> Finished:
        """Wait for the end of the command."""
        code = self._process.wait(timeout_s)
        out, err = (file.read_text(errors="replace") for file in self._files)
        return Finished(code, out, err, time.monotonic() - self._start)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
        """Wait while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"ended before {what}:\n{self.wait().err}"
            assert time.monotonic() < deadline, f"no {what} in {timeout_s} s"
            time.sleep(0.01)

    def wait_for_output(self, text: str) -> None:
        """Wait until the command has written `text` to its terminal."""
        self.wait_until(lambda: any(text in file.read_text() for file in self._files), text)

    def wait_until_nothing_runs(self, timeout_s: float) -> None:
        """Wait until no process of this command is left."""
        deadline = time.monotonic() + timeout_s
        while left := self.processes():
            assert time.monotonic() < deadline, f"still running after {timeout_s} s: {left}"
            time.sleep(0.05)


def run_cli(*arguments: object, folder: Path, **environment: str) -> Finished:
    """Run a command to its end."""
    with Command(*arguments, folder=folder, **environment) as command:
        return command.wait()


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it has ended, or is another user's
        return ""
