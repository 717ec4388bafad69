"""Messages between the trainer and the engine process, encoded with msgpack."""

from typing import Any, Literal

import msgspec

from megatron_cpgd.errors import ConfigError, RolloutError, WeightSyncError
from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.types import Rollout


class Launch(msgspec.Struct, kw_only=True):
    """How to start the engine process; JSON on its command line."""

    address: str
    """ZeroMQ address that the client has bound."""
    client_pid: int
    """The engine ends when this process does."""
    model_dir: str
    dtype: Literal["bf16", "fp32", "fp8_block"]
    """fp8_block: linear layers in blocks of FP8, which come with the first refresh; the rest bf16.
    """
    max_model_len: int
    """Prompt and response tokens."""
    seed: int
    trust_remote_code: bool
    return_routes: bool
    """Be able to fill `Rollout.routes`."""
    sleeps: bool
    """Be able to sleep."""
    engine_args: dict[str, Any]
    """Fields of vLLM's EngineArgs."""


class Generate(msgspec.Struct, tag=True, kw_only=True):
    """Asks for `Generated`."""

    prompts: list[list[int]]
    sampling: Sampling
    seeds: list[int] | None
    version: int


class Refresh(msgspec.Struct, tag=True, kw_only=True):
    """Asks for `Refreshed`."""

    arena: str
    version: int


class Sleep(msgspec.Struct, tag=True):
    """Asks for `Asleep`."""


class Close(msgspec.Struct, tag=True):
    """Asks the engine to end; it does not answer."""


class Ready(msgspec.Struct, tag=True):
    """The model is loaded; sent once, unasked."""


class Generated(msgspec.Struct, tag=True, kw_only=True):
    """[P][n] responses."""

    groups: list[list[Rollout]]


class Refreshed(msgspec.Struct, tag=True, kw_only=True):
    """What was read, see RefreshReport."""

    tensors: int
    nbytes: int
    fingerprints: dict[str, int]


class Asleep(msgspec.Struct, tag=True):
    """The GPU memory is given back, until a refresh."""


class Failed(msgspec.Struct, tag=True, kw_only=True):
    """The request was refused or broke off."""

    kind: Literal["config", "rollout", "weights"]
    message: str


EngineError = ConfigError | RolloutError | WeightSyncError


def as_error(failed: Failed) -> EngineError:
    """What the other side has raised."""
    match failed.kind:
        case "config":
            return ConfigError(failed.message)
        case "rollout":
            return RolloutError(failed.message)
        case "weights":
            return WeightSyncError(failed.message)


def as_message(error: EngineError) -> Failed:
    """The inverse of `as_error`."""
    match error:
        case ConfigError():
            return Failed(kind="config", message=f"{error}")
        case RolloutError():
            return Failed(kind="rollout", message=f"{error}")
        case WeightSyncError():
            return Failed(kind="weights", message=f"{error}")


Request = Generate | Refresh | Sleep | Close
Response = Ready | Generated | Refreshed | Asleep | Failed
