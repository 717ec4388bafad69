"""The trainer's side of the engine: starts vLLM in a process of its own and talks to it.

Nothing here imports vllm, which changes torch for the whole process it runs in.
"""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq

from megatron_cpgd.errors import ConfigError, RolloutError
from megatron_cpgd.rollout.message_engine import MessageEngine
from megatron_cpgd.rollout.messages import (
    Close,
    Launch,
    Request,
    Response,
)

logger = logging.getLogger(__name__)

POLL_MS = 200
"""How often a wait looks whether the engine still lives."""
CLOSE_GRACE_S = 10.0
LOG_TAIL_BYTES = 3000

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CPU_ENVIRONMENT = {
    # Idle OpenMP threads spin by default, which starves the trainers on shared cores.
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    # By default two engines pin their threads to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Compiling two small helpers takes longer than loading the model.
    "TORCH_COMPILE_DISABLE": "1",
    # One process instead of three, each with its own import of torch.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
TORCHRUN_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "MASTER_")
TORCHRUN_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


class VllmEngine(MessageEngine):
    """A RolloutEngine on vLLM. Construct it in a thread that lives as long as the engine should.

    Any thread may call it; calls wait for each other, but `close` ends the one that is going on.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: Literal["bf16", "fp32", "fp8_block"],
        max_model_len: int,
        engine_args: dict[str, Any],
        start_timeout_s: float,
        step_timeout_s: float,
        log_path: Path | None,
        seed: int,
        trust_remote_code: bool = False,
        return_routes: bool = False,
        sleeps: bool = False,
        devices: list[int] | None = None,
    ) -> None:
        """Start the process and return at once; it loads the model meanwhile.

        Args:
            model_dir: Hugging Face checkpoint with safetensors.
            dtype: of the weights. With fp8_block the engine starts without weights: it generates
                after its first refresh, with an arena whose linear layers are quantised.
            max_model_len: tokens of the longest prompt and its response together.
            engine_args: further fields of vLLM's EngineArgs.
            log_path: where the process writes; None keeps it in a temporary file.
            seed: for requests without a seed of their own.
            return_routes: accept `Sampling.return_routes`; costs memory and time even if unused.
            sleeps: accept `sleep`.
            devices: CUDA devices of the engine, numbered as this process sees them; None: all.
        """
        super().__init__(start_timeout_s=start_timeout_s, step_timeout_s=step_timeout_s)
        # mkdtemp gives mode 0700: nobody else can reach the socket.
        self._directory = tempfile.TemporaryDirectory(prefix="megatron-cpgd-")
        self._log_path = log_path or Path(self._directory.name) / "engine.log"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = self._context.socket(zmq.PAIR)
        address = f"ipc://{self._directory.name}/socket"
        self._channel.bind(address)
        self._busy = False
        """Whether a request has no answer yet."""
        self._process = self._start(
            Launch(
                address=address,
                client_pid=os.getpid(),
                model_dir=str(model_dir),
                dtype=dtype,
                max_model_len=max_model_len,
                seed=seed,
                trust_remote_code=trust_remote_code,
                return_routes=return_routes,
                sleeps=sleeps,
                engine_args=engine_args,
            ),
            devices,
        )

    def _start(self, launch: Launch, devices: list[int] | None) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "megatron_cpgd.rollout.vllm_server"]
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()  # behind what an earlier run has left
            return subprocess.Popen(
                [*command, msgspec.json.encode(launch).decode()],
                env=engine_environment(dict(os.environ), cpu=has_cpu_build(), devices=devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the trainer, which then ends the engine.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def close(self) -> None:
        """See RolloutEngine.close."""
        if self._calling.locked():
            self._kill()  # the call in another thread notices and raises
        with self._calling:
            self._close()

    def _close(self) -> None:
        if self._context.closed:
            return
        if self._ready and not self._busy and self._process.poll() is None:
            self._send(Close())
            try:
                self._process.wait(CLOSE_GRACE_S)
            except subprocess.TimeoutExpired:
                logger.warning("the engine did not end in %.0f s and is killed", CLOSE_GRACE_S)
        self._kill()
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def _send(self, request: Request) -> None:
        if self._context.closed:
            return  # the wait for its answer will say so
        self._busy = True
        try:
            self._channel.send(msgspec.msgpack.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            # The engine has hung up; the wait for its answer will find it dead.
            self._kill()

    def _answer(self, limit_s: float, what: str) -> Response:
        if self._context.closed:
            raise RolloutError(f"{what}: the engine was closed")
        deadline = time.monotonic() + limit_s
        while not self._channel.poll(POLL_MS):
            # It may have answered just before it ended.
            if self._process.poll() is not None and not self._channel.poll(0):
                raise RolloutError(self._died(what))
            if time.monotonic() > deadline:
                # A late answer must not be taken for that of the next request.
                self._kill()
                raise RolloutError(
                    f"{what}: no answer from the engine within {limit_s:g} s, so it was killed; "
                    f"last lines of its log:\n{self._log_tail()}"
                )
        answer: Response = msgspec.msgpack.decode(self._channel.recv(), type=Response)
        self._busy = False
        return answer

    def _kill(self) -> None:
        if self._process.poll() is None:
            # Its own session, see `_start`: this includes vLLM's worker processes.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _died(self, what: str) -> str:
        code = self._process.returncode
        how = f"ended with exit code {code}"
        if code < 0:
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-code).name}{hint}"
        return f"{what}: the engine {how}; last lines of its log:\n{self._log_tail()}"

    def _log_tail(self) -> str:
        with self._log_path.open("rb") as log:
            log.seek(max(self._log_start, os.fstat(log.fileno()).st_size - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace").strip()


def has_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, found without importing it."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def check_devices(devices: list[int] | None, engines: int) -> None:
    """Raises ConfigError: the engines' devices do not fit the installed build of vLLM."""
    if devices is not None and has_cpu_build():
        raise ConfigError(
            f"rollout.devices={devices} names CUDA devices, but the installed vLLM computes on the "
            "CPU; remove it"
        )
    if devices is None and engines > 1 and not has_cpu_build():
        raise ConfigError(
            f"rollout.engines={engines}: on CUDA every engine needs devices of its own; name them "
            "in rollout.devices"
        )


def engine_environment(
    inherited: dict[str, str], *, cpu: bool, devices: list[int] | None = None
) -> dict[str, str]:
    """Environment of the engine: ours as defaults, the user's, without what torchrun has set.

    With torchrun's variables vLLM would take itself for a rank of the trainer.

    Args:
        devices: CUDA devices of the engine among those that `inherited` shows; None: all of them.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name not in TORCHRUN_NAMES and not name.startswith(TORCHRUN_PREFIXES)
    }
    if devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = visible_devices(devices, kept.get("CUDA_VISIBLE_DEVICES"))
    return ENVIRONMENT | (CPU_ENVIRONMENT if cpu else {}) | kept


def visible_devices(devices: list[int], visible: str | None) -> str:
    """CUDA_VISIBLE_DEVICES of a process that gets `devices` of those that are visible to this."""
    if not visible:
        return ",".join(map(str, devices))
    names = visible.split(",")
    if max(devices) >= len(names):
        raise ConfigError(
            f"rollout.devices: expected numbers below {len(names)}, as CUDA_VISIBLE_DEVICES="
            f"{visible} shows so many; got {max(devices)}"
        )
    return ",".join(names[device] for device in devices)
