"""Messages between rank 0 and the engine nodes, encoded with msgpack."""

import msgspec

from megatron_cpgd.rollout.messages import Failed, Generate, Refresh, Response


class Hello(msgspec.Struct, tag=True, kw_only=True):
    """A node introduces itself."""

    node: int
    host: str


class Welcome(msgspec.Struct, tag=True):
    """Rank 0 knows the node, which answers with a Pulse."""


class Pulse(msgspec.Struct, tag=True):
    """The sender is alive; each side sends one every second."""


class Ask(msgspec.Struct, tag=True, kw_only=True):
    """A request to one of the node's engines; asks for `Answer`."""

    engine: int
    request: Generate | Refresh


class Answer(msgspec.Struct, tag=True, kw_only=True):
    """Of an engine; its `Ready` comes unasked."""

    engine: int
    response: Response


class OpenLinks(msgspec.Struct, tag=True, kw_only=True):
    """Connect to the ranks that will send weights; there is no answer."""

    host: str
    port: int
    """Of the torch.distributed store where the two ends meet."""
    backend: str
    elements: dict[int, int]
    """That the node gets at each sync, by rank."""
    timeout_s: float


class Receive(msgspec.Struct, tag=True, kw_only=True):
    """Take the next weights from the ranks; asks for `Received`."""

    version: int


class Received(msgspec.Struct, tag=True, kw_only=True):
    """The weights have arrived, whole, and the arena is ready to be read."""

    version: int
    arena: str
    network_bytes: int
    network_s: float


class Leave(msgspec.Struct, tag=True):
    """End the engines and the process; asks for `Left`."""


class Left(msgspec.Struct, tag=True):
    """The node needs rank 0 no longer. Without this, rank 0 could hang up before it was heard."""


ToNode = Welcome | Pulse | Ask | OpenLinks | Receive | Leave
FromNode = Hello | Pulse | Answer | Received | Failed | Left
"""`Failed` is about the node as a whole."""
