"""A process that takes the weights of some ranks for an engine node.

One process drives one GPU's network card and one stream of copies. A node has several of the
former, and memory for several of the latter, so the process that serves starts more of them, which
write to its arena.
"""

import logging
import os
import subprocess
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.lifetime import end_with_parent
from megatron_cpgd.rollout.messages import Failed
from megatron_cpgd.rollout.node_messages import OpenLinks, Receive
from megatron_cpgd.rollout.vllm_engine import visible_devices
from megatron_cpgd.weight_sync.links import Link
from megatron_cpgd.weights.bucket_stream import receive_pieces
from megatron_cpgd.weights.tensor_file import TensorFile

logger = logging.getLogger(__name__)

SENDERS_AT_A_TIME = 4
"""Of one process; each needs memory for a bucket. Every process begins with the lowest of its
ranks: the lowest one of all that still send is served wherever it sends, so none waits for another
in a circle."""


class Done(msgspec.Struct, tag=True, kw_only=True):
    """The order is carried out. With Receive: what has been written to the arena."""

    elements: dict[str, int] = {}
    """By tensor."""
    nbytes: int = 0


Order = OpenLinks | Receive
_Answer = Done | Failed


class _Launch(msgspec.Struct, kw_only=True):
    """How to start a receiver process; JSON on its command line."""

    parent_pid: int
    pipe: int
    """File descriptor."""
    node: int
    arena: str


class Receiver:
    """Takes weights in this process."""

    def __init__(self, arena: TensorFile, node: int) -> None:
        self._arena, self._node = arena, node
        self._links: list[Link] = []

    def obey(self, order: Order) -> Done:
        """Carry out an order.

        Raises:
            RuntimeError: a rank is gone.
        """
        match order:
            case OpenLinks():
                self._open_links(order)
            case Receive():
                return self._take()
        return Done()

    def _open_links(self, order: OpenLinks) -> None:
        timeout = timedelta(seconds=order.timeout_s)
        store = TCPStore(order.host, order.port, timeout=timeout)
        self._links = [
            Link(
                store,
                rank=rank,
                node=self._node,
                is_node=True,
                backend=order.backend,
                timeout=timeout,
            )
            for rank in sorted(order.elements)  # see NodeWeights
        ]

    def _take(self) -> Done:
        elements: Counter[str] = Counter()
        nbytes = 0
        adding = threading.Lock()

        def take(link: Link) -> None:
            nonlocal nbytes
            for name, index, values in receive_pieces(link):
                self._arena.view(name)[index].copy_(values)
                with adding:
                    elements[name] += values.numel()
                    nbytes += values.nbytes

        with ThreadPoolExecutor(SENDERS_AT_A_TIME, "weights") as threads:
            for _ in threads.map(take, self._links):
                pass
        return Done(elements=elements, nbytes=nbytes)


class ReceiverProcess:
    """A Receiver in a process of its own, which ends with the thread that makes this."""

    def __init__(self, arena: TensorFile, node: int, *, number: int, gpu: int | None) -> None:
        """
        Args:
            number: of the process on the node, for messages.
            gpu: the only one that it sees, of those that this process sees; None: the same ones.
        """
        self._name = f"receiver {number} of the weights"
        environment = dict(os.environ)
        if gpu is not None:
            known = environment.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible_devices([gpu], known)
        self._pipe, theirs = Pipe()
        with theirs:
            launch = _Launch(
                parent_pid=os.getpid(),
                pipe=theirs.fileno(),
                node=node,
                arena=str(arena.path),
            )
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, msgspec.json.encode(launch).decode()],
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for this process, which then ends the other
            )

    def obey(self, order: Order) -> Done:
        """See Receiver.obey.

        Raises:
            RolloutError: the process has failed or ended.
        """
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(order))
            answer: _Answer = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=_Answer)
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise RolloutError(f"{self._name} has ended with exit code {code}") from error
        if isinstance(answer, Failed):
            logger.error("%s failed:\n%s", self._name, answer.message)
            last = answer.message.splitlines()[-1]
            raise RolloutError(f"{self._name} failed with {last}; see its log")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Entry point of `python -m megatron_cpgd.weight_sync.receiver LAUNCH_JSON`."""
    launch = msgspec.json.decode(sys.argv[1], type=_Launch)
    end_with_parent(launch.parent_pid)
    receiver = Receiver(TensorFile.open(Path(launch.arena), writable=True), launch.node)
    with Connection(launch.pipe) as pipe, suppress(EOFError):
        while True:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=Order)
            try:
                answer: _Answer = receiver.obey(order)
            except Exception:
                answer = Failed(kind="rollout", message=traceback.format_exc().strip())
            pipe.send_bytes(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
