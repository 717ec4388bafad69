"""The engine process: loads vLLM, then answers one request after the other."""

import sys

import msgspec
import zmq

from megatron_cpgd.errors import ConfigError
from megatron_cpgd.imports import without_collection
from megatron_cpgd.rollout.lifetime import end_with_parent, parent_lives
from megatron_cpgd.rollout.messages import Close, Failed, Launch, Ready, Request

PARENT_CHECK_MS = 1000


def main() -> None:
    """Entry point of `python -m megatron_cpgd.rollout.vllm_server LAUNCH_JSON`."""
    launch = msgspec.json.decode(sys.argv[1], type=Launch)
    end_with_parent(launch.client_pid)
    context = zmq.Context()
    channel = context.socket(zmq.PAIR)
    channel.connect(launch.address)
    try:
        exit_code = serve(launch, channel)
    finally:
        # Delivers the last answer; a client that is gone does not keep us.
        context.destroy(linger=2000)
    sys.exit(exit_code)


def serve(launch: Launch, channel: "zmq.Socket[bytes]") -> int:
    """Answer requests until the client says `Close`; returns the exit code."""
    # Not at the top: vLLM takes seconds to import, and the client may die meanwhile.
    with without_collection():
        from megatron_cpgd.rollout.vllm_requests import Engine, build_llm

    try:
        engine = Engine(build_llm(launch), launch)
    except ConfigError as error:
        channel.send(msgspec.msgpack.encode(Failed(kind="config", message=f"{error}")))
        return 2
    channel.send(msgspec.msgpack.encode(Ready()))
    while True:
        while not channel.poll(PARENT_CHECK_MS):
            if not parent_lives(launch.client_pid):
                return 1
        request = msgspec.msgpack.decode(channel.recv(), type=Request)
        if isinstance(request, Close):
            return 0
        channel.send(msgspec.msgpack.encode(engine.answer(request)))
        if engine.broken:
            return 1


if __name__ == "__main__":
    main()
