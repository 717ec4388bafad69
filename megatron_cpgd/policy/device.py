"""Run stock megatron-core on a machine without CUDA: gloo and CPU tensors.

`install()` does nothing where CUDA is available. Elsewhere it replaces functions that raise
without a driver, so it cannot change code that works. What remains is listed here in full:

1. `torch.cuda.*` (device, stream, event, RNG) and `.cuda()`: CPU equivalents or no-ops.
2. `device="cuda"` literals of megatron-core: the modules in `LITERAL_MODULES` see a `torch` whose
   tensor factories read "cuda" as "cpu". torch itself stays as it is: no cost per operation.
3. `Tensor.type()` also compares equal to its CUDA spelling, because the optimizers test
   `param.type() == 'torch.cuda.FloatTensor'`.
4. `torch.compile` is the identity while megatron.core is imported (its `jit_fuser`): there is
   nothing to fuse on CPU, and it would double the import time.
5. Megatron's RNG-state setter queues itself for ever when CUDA is not initialised, so the states
   of dropout and recompute would silently not be restored.
6. torch's AdamW in the distributed optimizer: upstream cannot load its `step`, would share one
   `step` tensor between all parameters, so that each of them counts it, and fails where an
   optimizer has no parameter (that of the experts, on a pipeline stage without any).
7. Mixture of experts: the token dispatchers pass split sizes as tensors unless these are on CUDA,
   and gloo gathers and scatters equal parts only, where NCCL takes unequal ones.

Written for megatron-core 0.19; `tests/unit/policy/test_device.py` fails when a new release holds
literals that this list does not name.
"""

import contextlib
import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

CPU = torch.device("cpu")

LITERAL_MODULES = (
    "utils",
    "tensor_parallel.data",
    "pipeline_parallel.schedules",
    "transformer.utils",
    "models.common.embeddings.rope_utils",  # pin_memory
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "dist_checkpointing.exchange_utils",
    "dist_checkpointing.strategies.state_dict_saver",
)
"""Modules of megatron.core with a CUDA literal on a path that we run."""

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand",
    "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip

_installed = False


def install() -> None:
    """Make megatron-core usable on CPU. Call before anything imports megatron.core."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    assert "megatron.core" not in sys.modules, (
        "device.install() must run before megatron is imported"
    )
    _installed = True
    _replace_cuda_functions()
    _import_without_compile()
    _replace_literals()
    _restore_rng_states()
    _load_adamw_steps()
    _dispatch_tokens()


class _Idle:
    """A stream or an event of a device on which nothing is asynchronous."""

    cuda_stream, device = 0, CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Idle | None" = None) -> "_Idle":
        return event or _Idle()

    def wait(self, *args: Any) -> None:
        pass

    record = synchronize = wait_stream = wait_event = wait


class _TypeName(str):
    """'torch.FloatTensor' that also equals 'torch.cuda.FloatTensor'; hash and text stay."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str(self) == str.replace(other, "torch.cuda.", "torch.")

    def __ne__(self, other: object) -> bool:
        return not self == other


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    stream = _Idle()
    cuda.current_device = lambda: CPU
    cuda.set_device = cuda.synchronize = lambda *args, **kwargs: None
    cuda.Stream = cuda.Event = _Idle
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext(stream)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(
        state
    )
    cuda.manual_seed = cuda.random.manual_seed = torch.default_generator.manual_seed
    tensor: Any = torch.Tensor
    module: Any = torch.nn.Module
    tensor.cuda = lambda self, *args, **kwargs: self
    module.cuda = lambda self, device=None: self
    tensor_type = tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        return _TypeName(tensor_type(self))

    tensor.type = type_


def _import_without_compile() -> None:
    compile_ = torch.compile
    torch.compile = lambda fn=None, **kwargs: fn or (lambda f: f)  # type: ignore[assignment]
    try:
        for name in LITERAL_MODULES:
            importlib.import_module(f"megatron.core.{name}")
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compile_


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _replace_literals() -> None:
    view: Any = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    view.__dict__["__getattr__"] = lambda name: getattr(torch, name)  # torch's lazy attributes
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    for name in LITERAL_MODULES:
        module: Any = sys.modules[f"megatron.core.{name}"]
        module.torch = view


def _restore_rng_states() -> None:
    from megatron.core.tensor_parallel import random

    def set_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    random._set_cuda_rng_state = set_state
    # The "GPU" generator is the CPU's here, so upstream's warning at every fork says nothing.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )


def _load_adamw_steps() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    load = DistributedOptimizer.load_state_dict
    set_states = DistributedOptimizer._set_main_param_and_optimizer_states
    state_dict = DistributedOptimizer.state_dict

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        with torch.no_grad():
            load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def set_param_states(self: Any, param: torch.Tensor, tensors: dict[str, Any]) -> None:
        set_states(self, param, {"step": None, **tensors})

    def state_dict_without_step(self: Any) -> Any:
        if any(group["params"] for group in self.optimizer.param_groups):
            return state_dict(self)
        groups = [
            {"step": 0.0} | {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        return {"optimizer": {"param_groups": groups}}

    DistributedOptimizer.state_dict = state_dict_without_step
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_param_states


def _dispatch_tokens() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    for module in (moe_utils, token_dispatcher):
        module.maybe_move_tensor_to_cpu = split_sizes

    gather = mappings._gather_along_first_dim
    reduce_scatter = mappings._reduce_scatter_along_first_dim

    def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(rows - x.size(0), *x.shape[1:])])

    def gather_parts(x: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> Any:
        if sizes is None or group.size() == 1:
            return gather(x, group, sizes, *args)
        rows = max(1, *sizes)
        parts = gather(padded(x, rows), group).split(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter_parts(x: torch.Tensor, group: Any, sizes: Any = None, *args: Any) -> Any:
        if sizes is None or group.size() == 1:
            return reduce_scatter(x, group, sizes, *args)
        rows = max(1, *sizes)
        whole = torch.cat([padded(part, rows) for part in x.split(list(sizes))])
        return reduce_scatter(whole, group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather_parts
    mappings._reduce_scatter_along_first_dim = reduce_scatter_parts


def current() -> torch.device:
    """The device of this rank's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CPU
