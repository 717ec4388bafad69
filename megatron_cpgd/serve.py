"""An engine node: starts its engines, receives their weights, and passes rank 0's requests on.

No megatron and no vllm here: the engines are processes of their own, as beside rank 0.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.errors import ConfigError, ConversionError, RolloutError, WeightSyncError
from megatron_cpgd.rollout.messages import (
    Failed,
    Generate,
    Generated,
    Ready,
    Refresh,
    Refreshed,
    Response,
    as_message,
)
from megatron_cpgd.rollout.node_channel import PULSE_S, SILENCE_S, NodeChannel, connect
from megatron_cpgd.rollout.node_messages import (
    Answer,
    Ask,
    Hello,
    Leave,
    Left,
    OpenLinks,
    Pulse,
    Receive,
)
from megatron_cpgd.rollout.start import start_engine_of_node
from megatron_cpgd.rollout.vllm_engine import VllmEngine
from megatron_cpgd.slurm import find_interface, host_name
from megatron_cpgd.tracking.logging import setup_logging
from megatron_cpgd.tracking.run_folder import RunFolder
from megatron_cpgd.weight_sync.node_arena import NodeArena
from megatron_cpgd.weights.hf_checkpoint import read_config
from megatron_cpgd.weights.registry import weight_table

logger = logging.getLogger(__name__)


def serve(config: ExperimentConfig, node: int) -> None:
    """Be engine node number `node` until rank 0 lets it go.

    Raises:
        RolloutError: rank 0 never came, or is gone.
    """
    folder = RunFolder(config.run.dir)
    setup_logging(f"engine node {node}", folder.engine_node_log(node))
    hello = Hello(node=node, host=host_name())
    channel, access = connect(folder.engine_nodes_key, hello, config.rollout.start_timeout_s)
    logger.info("connected to rank 0 on %s", access.host)
    # Gloo's default is the interface of this host's own name, often a loopback address.
    interface = find_interface(access.host, access.port)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    server = _Server(config, folder, hello, channel)
    try:
        server.run()
    finally:
        server.close()


class _Server:
    """A thread for each engine, since it ends with the thread that has started it, and one for the
    weights. The main thread talks to rank 0."""

    def __init__(
        self, config: ExperimentConfig, folder: RunFolder, hello: Hello, channel: NodeChannel
    ) -> None:
        self._config, self._folder, self._me, self._channel = config, folder, hello, channel
        self._engines: dict[int, VllmEngine] = {}
        self._requests: list[SimpleQueue[Generate | Refresh]] = [
            SimpleQueue() for _ in range(config.rollout.engines_per_node)
        ]
        self._weights: NodeArena | None = None
        self._orders: SimpleQueue[OpenLinks | Receive] = SimpleQueue()

    def run(self) -> None:
        """Do what rank 0 asks for until it says that it is done."""
        _start_thread(self._serve_weights)
        for engine in range(len(self._requests)):
            _start_thread(self._serve_engine, engine)
        silent, next_pulse = 0, time.monotonic()
        while True:
            for message in self._channel.exchange(PULSE_S):
                silent = 0
                match message:
                    case Ask():
                        self._requests[message.engine].put(message.request)
                    case OpenLinks() | Receive():
                        self._orders.put(message)
                    case Leave():
                        self._channel.send(Left())
                        self._channel.exchange(0)
                        return
            if time.monotonic() >= next_pulse:
                next_pulse = time.monotonic() + PULSE_S
                self._channel.send(Pulse())
                silent += 1
                if silent * PULSE_S > SILENCE_S:
                    raise RolloutError(f"rank 0 has been silent for {SILENCE_S:g} s")

    def close(self) -> None:
        """End the engines, and free the memory of the weights."""
        for engine in list(self._engines.values()):
            engine.close()
        self._channel.close()
        if self._weights:
            self._weights.close()

    def _serve_engine(self, number: int) -> None:
        def reply(work: Callable[[], Response]) -> Response:
            response = self._attempt(work)
            self._channel.send(Answer(engine=number, response=response))
            return response

        if isinstance(reply(lambda: self._start_engine(number)), Ready):
            while True:
                request = self._requests[number].get()
                reply(lambda request=request: self._ask(number, request))  # type: ignore[misc]

    def _start_engine(self, number: int) -> Response:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        log_path = self._folder.logs / "engine.log"
        engine = start_engine_of_node(self._config, log_path, self._me.node, number, gpus)
        self._engines[number] = engine
        engine.wait_ready()
        return Ready()

    def _ask(self, number: int, request: Generate | Refresh) -> Response:
        engine = self._engines[number]
        if isinstance(request, Generate):
            groups = engine.generate(
                request.prompts, request.sampling, seeds=request.seeds, version=request.version
            )
            return Generated(groups=groups)
        assert self._weights is not None
        report = engine.refresh(self._weights.arena.path, request.version)
        return Refreshed(
            tensors=report.tensors, nbytes=report.nbytes, fingerprints=report.fingerprints
        )

    def _serve_weights(self) -> None:
        def obey() -> Failed:
            table = weight_table(read_config(self._config.model.path))
            format = self._config.precision.engine_weights
            self._weights = NodeArena(table, format, self._me.node)
            while True:
                order = self._orders.get()
                if isinstance(order, OpenLinks):
                    self._weights.open_links(order)
                else:
                    self._channel.send(self._weights.receive(order.version))

        self._channel.send(self._attempt(obey))

    def _attempt[Answer](self, work: Callable[[], Answer]) -> Answer | Failed:
        """What `work` returns, or why it does not."""
        where = f"engine node {self._me.node} on {self._me.host}"
        try:
            return work()
        except (ConfigError, RolloutError, WeightSyncError) as error:
            return as_message(type(error)(f"{where}: {error}"))
        except ConversionError as error:
            return Failed(kind="weights", message=f"{where}: {error}")
        except Exception as error:
            logger.exception("failed")
            return Failed(kind="rollout", message=f"{where} failed with {error!r}; see its log")


def _start_thread(work: Callable[..., None], *arguments: int) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()
