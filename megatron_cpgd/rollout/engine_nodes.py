"""Rank 0's end of the connections to the engine nodes."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.messages import Failed, Response, as_error
from megatron_cpgd.rollout.node_channel import (
    MORE,
    PULSE_S,
    SILENCE_S,
    Access,
    Outbox,
    write_access,
)
from megatron_cpgd.rollout.node_messages import (
    Answer,
    FromNode,
    Hello,
    Leave,
    Left,
    Pulse,
    Received,
    ToNode,
    Welcome,
)

logger = logging.getLogger(__name__)

LOG_TAIL_BYTES = 3000
_LEAVE_S = 3.0
"""For the nodes to hear that they may leave."""


@dataclass(slots=True)
class _Node:
    """What is known of one node; guarded by `EngineNodes._changed`."""

    name: str
    log_path: Path
    log_start: int
    address: bytes | None = None
    """Of its latest Hello; None before, and when it is gone."""
    joined: bool = False
    """Whether it has answered the Welcome."""
    silent: int = 0
    """Pulses of ours since its last message."""
    waiting: list[ToNode] = field(default_factory=list)
    """What to send when it has joined."""
    parts: bytearray = field(default_factory=bytearray)
    """Of a message whose end has not come yet."""
    answers: dict[int, Response] = field(default_factory=dict)
    """By engine, if not fetched yet."""
    received: Received | None = None


class EngineNodes:
    """The connections to all engine nodes. Any thread may call it.

    A thread of its own sends, receives and watches: a node that is lost, or that says that it has
    failed, ends every wait, whatever node that is for.
    """

    def __init__(
        self, count: int, *, host: str, key_file: Path, log_path: Callable[[int], Path]
    ) -> None:
        """Listen, and write the key file. Nodes may come at any time.

        Args:
            host: where the nodes reach this process; a loopback address if they are on this host.
            log_path: where a node, by number, writes; its end is shown if the node is lost.
        """
        self._key_file = key_file
        self._nodes = [
            _Node(name=f"engine node {i}", log_path=(path := log_path(i)), log_start=_size(path))
            for i in range(count)
        ]
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._closed = False
        self._outbox: Outbox[tuple[_Node, ToNode]] = Outbox()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        access = self._listen(host)
        self._thread = threading.Thread(target=self._run, name="engine-nodes", daemon=True)
        self._thread.start()
        write_access(key_file, access)

    def _listen(self, host: str) -> Access:
        server_key, server_secret = zmq.curve_keypair()
        public_key, secret_key = zmq.curve_keypair()
        self._authenticator = ThreadAuthenticator(self._context, log=logger)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", _OneKey(public_key))
        self._router.curve_server = True
        self._router.curve_secretkey = server_secret
        self._router.curve_publickey = server_key
        # An error instead of silence if a message is for a node that has hung up.
        self._router.router_mandatory = True
        self._router.sndhwm = self._router.rcvhwm = 0
        interface = host if host.startswith("127.") else "*"
        port = self._router.bind_to_random_port(f"tcp://{interface}")
        return Access(
            host=host,
            port=port,
            server_key=server_key.decode(),
            public_key=public_key.decode(),
            secret_key=secret_key.decode(),
        )

    def send(self, node: int, message: ToNode) -> None:
        """Send as soon as the node is connected."""
        self._outbox.put((self._nodes[node], message))

    def answer(self, node: int, engine: int, limit_s: float, what: str) -> Response:
        """The engine's next response.

        Args:
            what: it does, for messages.

        Raises:
            RolloutError: no answer in time, or a node was lost.
            ConfigError, WeightSyncError: what a node says.
        """

        def take(state: _Node) -> list[Response] | None:
            return [state.answers.pop(engine)] if engine in state.answers else None

        [response] = self._wait(take, self._nodes[node], limit_s, what)
        return response

    def received(self, node: int, limit_s: float) -> Received:
        """The node's report on the weights it was sent. Raises as `answer` does."""

        def take(state: _Node) -> Received | None:
            received, state.received = state.received, None
            return received

        return self._wait(take, self._nodes[node], limit_s, "receiving weights")

    def check(self, within_s: float = 0.0) -> None:
        """Raise if a node is lost or has failed, or does so within some seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, within_s)
            self._check("sending weights")

    def close(self) -> None:
        """Let the nodes end; safe to call twice. Waits in other threads raise."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        for node in self._nodes:
            self._outbox.put((node, Leave()))
        self._thread.join()
        self._authenticator.stop()
        self._context.destroy(linger=2000)
        self._key_file.unlink(missing_ok=True)

    def _wait[Value](
        self, take: Callable[[_Node], Value | None], node: _Node, limit_s: float, what: str
    ) -> Value:
        deadline = time.monotonic() + limit_s
        with self._changed:
            while (value := take(node)) is None:
                self._check(what)
                if time.monotonic() > deadline:
                    reason = "has not answered" if node.joined else "has not connected"
                    raise RolloutError(
                        f"{what}: {node.name} {reason} within {limit_s:g} s{_log_tail(node)}"
                    )
                self._changed.wait(PULSE_S)
            return value

    def _check(self, what: str) -> None:
        if self._closed:
            raise RolloutError(f"{what}: the engine nodes were let go")
        if self._failure:
            raise self._failure

    def _run(self) -> None:
        try:
            self._exchange()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error  # type: ignore[assignment]
                self._changed.notify_all()
            raise

    def _exchange(self) -> None:
        """Send, receive and watch until `close` and the nodes have left; the only user of the
        socket."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._outbox.event, zmq.POLLIN)
        next_pulse, leaving = time.monotonic(), 0
        while True:
            poller.poll(int(PULSE_S * 1000))
            while self._router.poll(0) and time.monotonic() < next_pulse:
                with self._changed:
                    self._take(*self._router.recv_multipart())
                    self._changed.notify_all()
            for node, message in self._outbox.take_all():
                self._send(node, message)
            if self._closed and not any(node.address for node in self._nodes):
                return
            if time.monotonic() >= next_pulse:
                next_pulse = time.monotonic() + PULSE_S
                leaving += self._closed
                if leaving * PULSE_S > _LEAVE_S:
                    return
                for node in self._nodes:
                    self._watch(node)

    def _take(self, address: bytes, mark: bytes, part: bytes) -> None:
        node = next((node for node in self._nodes if node.address == address), None)
        if node is None:
            with suppress(msgspec.DecodeError):  # a lost node may still send something else
                self._greet(address, msgspec.msgpack.decode(part, type=Hello))
            return
        node.silent = 0
        if not node.joined:
            self._let_in(node)
        node.parts += part
        if mark == MORE:
            return
        message: FromNode = msgspec.msgpack.decode(node.parts, type=FromNode)
        node.parts = bytearray()
        match message:
            case Answer():
                node.answers[message.engine] = message.response
            case Received():
                node.received = message
            case Left():
                node.address = None
            case Failed():
                self._failure = self._failure or as_error(message)

    def _greet(self, address: bytes, hello: Hello) -> None:
        node = self._nodes[hello.node] if hello.node < len(self._nodes) else None
        if node is None or node.joined:
            logger.warning("refused a second or unknown %s", hello)
            return
        # One that has not answered may have given up: this process can be slow to welcome it.
        node.address, node.silent = address, 0
        node.name = f"engine node {hello.node} on {hello.host}"
        self._post(node, Welcome())

    def _let_in(self, node: _Node) -> None:
        node.joined = True
        logger.info("%s is connected", node.name)
        for message in node.waiting:
            self._post(node, message)
        node.waiting.clear()

    def _send(self, node: _Node, message: ToNode) -> None:
        if node.joined:
            self._post(node, message)
        else:
            node.waiting.append(message)

    def _post(self, node: _Node, message: ToNode) -> None:
        if node.address is None:
            return
        try:
            self._router.send_multipart([node.address, msgspec.msgpack.encode(message)])
        except zmq.ZMQError:
            self._lose(node, "its process has ended, or its network has failed")

    def _watch(self, node: _Node) -> None:
        if node.address is None:
            return
        self._post(node, Pulse())
        node.silent += 1
        # Counted, not read from a clock: a run that was suspended as a whole has lost nobody.
        if node.silent * PULSE_S > SILENCE_S:
            self._lose(node, f"silent for {SILENCE_S:g} s")

    def _lose(self, node: _Node, reason: str) -> None:
        node.address = None
        if self._closed or self._failure or not node.joined:
            return
        with self._changed:
            self._failure = RolloutError(f"{node.name} is lost: {reason}{_log_tail(node)}")
            self._changed.notify_all()


class _OneKey:
    """Lets in who has the nodes' key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by pyzmq for every client."""
        return key == self._key


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _log_tail(node: _Node) -> str:
    with suppress(OSError), node.log_path.open("rb") as log:
        log.seek(max(node.log_start, _size(node.log_path) - LOG_TAIL_BYTES))
        tail = log.read().decode(errors="replace").strip()
        return f"; last lines of {node.log_path}:\n{tail}"
    return f"; it has no log {node.log_path}"
