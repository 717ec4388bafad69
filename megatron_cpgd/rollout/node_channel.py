"""The encrypted connection between rank 0 and an engine node: keys, and the node's end.

Rank 0 writes a file that only the user can read, with its address and new keys, at each start. Who
has read it is let in, nobody else (CurveZMQ, https://rfc.zeromq.org/spec/26).
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec
import zmq

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.node_messages import FromNode, Hello, Pulse, ToNode, Welcome

logger = logging.getLogger(__name__)

PULSE_S = 1.0
SILENCE_S = 30.0
"""Without a sign of life for so long, the other side is taken for lost."""
PART_BYTES = 4 << 20
"""A node sends longer messages in parts, each of which is a sign of life: pulses would wait behind
the routes of a large batch, which take minutes on a slow network."""
LAST, MORE = b"", b"+"
_WELCOME_MS = 3000
_LOOK_S = 0.2


class Access(msgspec.Struct, kw_only=True):
    """Content of the key file. Keys are text, as ZeroMQ prints them."""

    host: str
    port: int
    server_key: str
    """Rank 0's public one."""
    public_key: str
    secret_key: str
    """Of all nodes."""


def write_access(path: Path, access: Access) -> None:
    """Write the key file, replacing one of an earlier start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(access))
    temporary.replace(path)


class Outbox[Item]:
    """Items that any thread puts in and one thread, which polls a socket too, takes out."""

    def __init__(self) -> None:
        self._items: SimpleQueue[Item] = SimpleQueue()
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        """A descriptor to poll: readable if there are items."""

    def put(self, item: Item) -> None:
        """Never waits."""
        self._items.put(item)
        os.eventfd_write(self.event, 1)

    def take_all(self) -> Iterator[Item]:
        """What is there."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.event)
        with suppress(Empty):
            while True:
                yield self._items.get_nowait()


class NodeChannel:
    """The end of an engine node. `send` may be called by any thread, the rest by one."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        """Use `connect`."""
        self._socket = socket
        self._outbox: Outbox[FromNode] = Outbox()
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(self._outbox.event, zmq.POLLIN)

    def send(self, message: FromNode) -> None:
        """Hand a message over to the thread that calls `exchange`."""
        self._outbox.put(message)

    def exchange(self, wait_s: float) -> list[ToNode]:
        """Send what waits, and return what has come; at once if there is something to do.

        Raises:
            RolloutError: the connection broke: rank 0 has ended, or is unreachable.
        """
        self._poller.poll(int(wait_s * 1000))
        try:
            for message in self._outbox.take_all():
                _send(self._socket, message, zmq.NOBLOCK)
        except zmq.Again as error:
            raise RolloutError("the connection to rank 0 broke: it has ended") from error
        received = []
        while self._socket.poll(0):
            received.append(msgspec.msgpack.decode(self._socket.recv(), type=ToNode))
        return received

    def close(self) -> None:
        """Deliver what was handed over, if rank 0 still listens."""
        with suppress(RolloutError):
            self.exchange(0)
        self._socket.context.destroy(linger=2000)


def _send(socket: "zmq.Socket[bytes]", message: FromNode, flags: int = 0) -> None:
    """Send a message of a node in parts, each with a mark: LAST or MORE."""
    content = memoryview(msgspec.msgpack.encode(message))
    for start in range(0, len(content), PART_BYTES):
        end = start + PART_BYTES
        socket.send_multipart([LAST if end >= len(content) else MORE, content[start:end]], flags)


def connect(key_file: Path, hello: Hello, limit_s: float) -> tuple[NodeChannel, Access]:
    """Wait for rank 0 and connect to it. The key file of an earlier start leads nowhere; then look
    again.

    Raises:
        RolloutError: there was no rank 0 within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        with suppress(FileNotFoundError):
            access = msgspec.json.decode(key_file.read_bytes(), type=Access)
            socket = _try(access, hello)
            if socket:
                return NodeChannel(socket), access
        time.sleep(_LOOK_S)
    raise RolloutError(
        f"engine node {hello.node} on {hello.host}: rank 0 has not let it in within {limit_s:g} s "
        f"(rollout.start_timeout_s); it is expected to write {key_file}, on a file system that all "
        "nodes share"
    )


def _try(access: Access, hello: Hello) -> "zmq.Socket[bytes] | None":
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.curve_serverkey = access.server_key.encode()
    socket.curve_publickey = access.public_key.encode()
    socket.curve_secretkey = access.secret_key.encode()
    # No queue without a connection, and no second connection: a broken one is noticed at once.
    socket.immediate = True
    socket.reconnect_ivl = -1
    socket.sndhwm = socket.rcvhwm = 0
    socket.sndtimeo = _WELCOME_MS
    with suppress(zmq.ZMQError):  # zmq.Again: nobody there; others: the name does not resolve yet
        socket.connect(f"tcp://{access.host}:{access.port}")
        _send(socket, hello)
        if socket.poll(_WELCOME_MS):
            assert msgspec.msgpack.decode(socket.recv(), type=ToNode) == Welcome()
            _send(socket, Pulse())
            return socket
    context.destroy(linger=0)
    return None
