"""Rank 0 and engine nodes find, trust and lose each other; real sockets, the nodes are threads."""

import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import pytest
import zmq

from megatron_cpgd.errors import ConfigError, RolloutError
from megatron_cpgd.rollout import engine_nodes, node_channel
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.engine_nodes import EngineNodes
from megatron_cpgd.rollout.messages import Failed, Generated, Ready, Refreshed
from megatron_cpgd.rollout.node_channel import Access, NodeChannel, connect, write_access
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
from megatron_cpgd.rollout.remote_engine import RemoteEngine
from megatron_cpgd.types import Rollout, RouteLayout, Routes


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(node_channel, "_WELCOME_MS", 300)
    monkeypatch.setattr(engine_nodes, "PULSE_S", 0.2)
    monkeypatch.setattr(engine_nodes, "_LEAVE_S", 0.2)


@pytest.fixture
def key_file(tmp_path):
    return tmp_path / "run" / "engine_nodes.key"


@pytest.fixture
def nodes(tmp_path, key_file) -> Iterator[EngineNodes]:
    (tmp_path / "node_1.log").write_text("an earlier run\n")
    made = EngineNodes(
        2, host="127.0.0.1", key_file=key_file, log_path=lambda i: tmp_path / f"node_{i}.log"
    )
    yield made
    made.close()


@pytest.fixture
def join(key_file):
    """Connects as a node."""
    joined: list[NodeChannel] = []

    def connect_node(node: int) -> NodeChannel:
        channel, access = connect(key_file, Hello(node=node, host=f"host{node}"), limit_s=60)
        assert access.host == "127.0.0.1"
        joined.append(channel)
        return channel

    yield connect_node
    for channel in joined:
        hang_up(channel)


def hang_up(channel: NodeChannel) -> None:
    """What the kernel does when a process ends."""
    channel._socket.context.destroy(linger=0)


def remote(nodes, node=0, **limits) -> RemoteEngine:
    limits = {"start_timeout_s": 5, "step_timeout_s": 5} | limits
    return RemoteEngine(nodes, node, 0, **limits)


def answer_one(channel: NodeChannel, response) -> None:
    """Wait for a request to an engine and answer it."""
    while True:
        for message in channel.exchange(0.1):
            if isinstance(message, Ask):
                channel.send(Answer(engine=message.engine, response=response(message.request)))
                channel.exchange(0)
                return


def test_a_request_reaches_its_node_and_the_answer_comes_back(nodes, key_file, join):
    """Also if it was sent before the node was there."""
    engines = [remote(nodes, node) for node in range(2)]
    reports = {}

    def refresh(node: int) -> None:
        reports[node] = engines[node].refresh(key_file, version=3)

    callers = [threading.Thread(target=refresh, args=(node,)) for node in range(2)]
    for caller in callers:
        caller.start()
    for node in (1, 0):
        channel = join(node)
        channel.send(Answer(engine=0, response=Ready()))
        answer_one(
            channel,
            lambda request, node=node: Refreshed(
                tensors=request.version, nbytes=7, fingerprints={"from": node}
            ),
        )
    for caller in callers:
        caller.join(30)
    assert {node: (r.fingerprints, r.tensors) for node, r in reports.items()} == {
        0: ({"from": 0}, 3),
        1: ({"from": 1}, 3),
    }


@pytest.mark.parametrize(("kind", "error"), [("config", ConfigError), ("rollout", RolloutError)])
def test_an_engine_that_fails_to_load_is_the_same_error_on_rank_0(nodes, kind, error, join):
    channel = join(0)
    channel.send(Answer(engine=0, response=Failed(kind=kind, message="the reason")))
    channel.exchange(1)
    with pytest.raises(error, match="the reason"):
        remote(nodes).generate([[1]], Sampling(max_tokens=1), version=0)


def test_a_failure_of_one_node_ends_the_wait_for_another(nodes, join):
    channel = join(1)
    channel.send(Failed(kind="config", message="no GPU"))
    channel.exchange(1)
    with pytest.raises(ConfigError, match="no GPU"):
        remote(nodes, 0).generate([[1]], Sampling(max_tokens=1), version=0)


def test_the_keys_are_for_the_user_alone_and_leave_with_rank_0(nodes, key_file):
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    nodes.close()
    assert not key_file.exists()


@pytest.mark.parametrize("keys", ["none", "own"])
def test_a_client_without_the_nodes_key_is_not_heard(nodes, key_file, keys, join):
    access = msgspec.json.decode(key_file.read_bytes(), type=Access)
    context: zmq.Context = zmq.Context()
    client = context.socket(zmq.DEALER)
    if keys == "own":  # and it has got hold of rank 0's public key
        client.curve_publickey, client.curve_secretkey = zmq.curve_keypair()
        client.curve_serverkey = access.server_key.encode()
    client.connect(f"tcp://{access.host}:{access.port}")
    client.send(msgspec.msgpack.encode(Hello(node=0, host="stranger")))
    assert not client.poll(500)
    context.destroy(linger=0)
    join(0)  # its place is free


def test_a_second_node_of_the_same_number_is_not_let_in(nodes, key_file, join):
    first = join(0)
    with pytest.raises(RolloutError, match=r"engine node 0 on host0: rank 0 has not let it in"):
        connect(key_file, Hello(node=0, host="host0"), limit_s=0.1)
    first.send(Pulse())
    first.exchange(0.1)
    nodes.check()


def test_a_node_that_rank_0_is_slow_to_welcome_asks_again(nodes, join):
    joined: list[NodeChannel] = []
    waiting = threading.Thread(target=lambda: joined.append(join(0)))
    with nodes._changed:  # what holds up rank 0 for longer than the node waits
        waiting.start()
        time.sleep(1)
    waiting.join(30)
    [channel] = joined
    order = Receive(version=1)
    nodes.send(0, order)
    while order not in channel.exchange(0.1):
        nodes.check()
    nodes.check(within_s=0.5)


def test_the_key_file_of_an_earlier_start_leads_nowhere(tmp_path, key_file, join):
    public, secret = (key.decode() for key in zmq.curve_keypair())
    stale = Access(
        host="127.0.0.1", port=1, server_key=public, public_key=public, secret_key=secret
    )
    write_access(key_file, stale)
    joined: list[NodeChannel] = []
    waiting = threading.Thread(target=lambda: joined.append(join(0)))
    waiting.start()
    time.sleep(0.5)
    assert not joined
    nodes = EngineNodes(1, host="127.0.0.1", key_file=key_file, log_path=lambda i: tmp_path / "no")
    waiting.join(30)
    assert joined
    nodes.close()


def test_a_node_whose_process_ends_is_named_within_seconds(nodes, tmp_path, join):
    channel = join(1)
    with (tmp_path / "node_1.log").open("a") as log:
        log.write("its last words\n")
    start = time.monotonic()
    hang_up(channel)
    with pytest.raises(RolloutError) as caught:
        nodes.received(1, limit_s=60)
    assert time.monotonic() - start < 20, "it waited for 30 s of silence"
    assert "engine node 1 on host1 is lost: its process has ended" in str(caught.value)
    assert str(caught.value).endswith("node_1.log:\nits last words")
    with pytest.raises(RolloutError, match="engine node 1"):
        nodes.check()


def test_a_node_that_falls_silent_is_lost(nodes, monkeypatch, join):
    monkeypatch.setattr(engine_nodes, "SILENCE_S", 0.5)
    join(0)
    with pytest.raises(RolloutError, match=r"engine node 0 on host0 is lost: silent for 0.5 s"):
        nodes.received(0, limit_s=60)


def slow_link(port: int, bytes_per_s: int) -> int:
    """A port of this host that leads to another one, from there at that speed."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

    def forward(source: socket.socket, target: socket.socket, pause_s: float) -> None:
        with suppress(OSError), source, target:
            while data := source.recv(1 << 16):
                time.sleep(pause_s)
                target.sendall(data)

    def serve() -> None:
        pause_s = (1 << 16) / bytes_per_s
        while True:  # a node that gets no welcome in time connects again
            here, _ = listener.accept()
            there = socket.create_connection(("127.0.0.1", port))
            for ends in ((here, there, pause_s), (there, here, 0)):
                threading.Thread(target=forward, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return listener.getsockname()[1]


def test_a_node_that_sends_for_longer_than_it_may_be_silent_is_not_lost(
    nodes, key_file, monkeypatch, join
):
    """Its pulses wait behind the routes of a large batch."""
    monkeypatch.setattr(engine_nodes, "SILENCE_S", 0.8)
    monkeypatch.setattr(node_channel, "PART_BYTES", 1 << 18)
    access = msgspec.json.decode(key_file.read_bytes(), type=Access)
    write_access(key_file, msgspec.structs.replace(access, port=slow_link(access.port, 4 << 20)))
    layout = RouteLayout(layers=[0], top_k=1, num_experts=2)
    rollout = Rollout(
        token_ids=[1], logprobs=[0.0], finish_reason="stop", weight_version=0,
        routes=Routes(layout=layout, experts=bytes(range(256)) * (40 << 10)),
    )  # fmt: skip  # 10 MiB: 2.5 s
    channel, done = join(0), threading.Event()

    def serve_node() -> None:
        channel.send(Answer(engine=0, response=Ready()))
        channel.send(Answer(engine=0, response=Generated(groups=[[rollout]])))
        while not done.is_set():
            channel.send(Pulse())
            channel.exchange(0.1)

    serving = threading.Thread(target=serve_node)
    serving.start()
    try:
        start = time.monotonic()
        assert remote(nodes, step_timeout_s=20).generate(
            [[1]], Sampling(max_tokens=1), version=0
        ) == [[rollout]]
        assert time.monotonic() - start > 1.6, "the link is not slow"
    finally:
        done.set()
        serving.join()


def test_a_node_that_never_comes_is_a_timeout_that_says_so(nodes):
    with pytest.raises(RolloutError, match=r"engine node 0 has not connected within 0\.1 s"):
        nodes.answer(0, 0, 0.1, "loading the model")


def test_a_node_is_told_to_leave_and_notices_that_rank_0_has_gone(nodes, join):
    obedient, deaf = join(0), join(1)
    closing = threading.Thread(target=nodes.close)
    closing.start()
    while Leave() not in obedient.exchange(0.1):
        pass
    obedient.send(Left())
    obedient.exchange(0)
    closing.join(30)  # it does not wait for the other one for ever
    start = time.monotonic()
    with pytest.raises(RolloutError, match="rank 0 broke"):
        while time.monotonic() < start + 30:
            deaf.send(Pulse())
            deaf.exchange(0.1)


def test_closing_ends_a_wait_in_another_thread(nodes, join):
    join(0)
    errors: list[RolloutError] = []

    def wait() -> None:
        try:
            nodes.answer(0, 0, 60, "generating")
        except RolloutError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    nodes.close()
    waiting.join(30)
    assert "the engine nodes were let go" in str(errors[0])


def test_orders_come_in_the_order_of_sending(nodes, join):
    for port in range(5):
        order = OpenLinks(host="h", port=port, backend="gloo", elements={}, timeout_s=1.0)
        nodes.send(0, order)
    channel, ports = join(0), []
    while len(ports) < 5:
        ports += [m.port for m in channel.exchange(0.1) if isinstance(m, OpenLinks)]
    assert ports == [0, 1, 2, 3, 4]
