"""Everything that depends on private names of vLLM 0.25: a new vLLM is adapted here.

The reload works layer by layer (vllm/model_executor/model_loader/reload/layerwise.py): all
parameters move to the meta device, a layer whose weights have all arrived is built, post-processed
and copied into the storage that the engine uses. It has no rollback, so one is added here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import vllm
from torch import nn
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.platforms import current_platform

SUPPORTED = "0.25."


def require_supported_vllm() -> None:
    """Stop before a changed private name can corrupt weights silently."""
    if not vllm.__version__.startswith(SUPPORTED):
        raise RuntimeError(
            f"vLLM {vllm.__version__} is installed, the weight refresh was written for "
            f"{SUPPORTED}x; install the locked version"
        )


def runs_on_cpu() -> bool:
    """Whether this is the CPU build of vLLM."""
    return bool(current_platform.is_cpu())


def engine_arg_names() -> set[str]:
    """Names that `vllm.LLM` accepts."""
    return {field.name for field in fields(EngineArgs)}


@contextmanager
def parameters_on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, all parameters are as the checkpoint loaders expect them, without storage.

    The engine's own tensors, packed for its kernels, are back in place afterwards.
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        info.kernel_tensors = layerwise.get_layer_params_buffers(layer)
        restore_layer_on_meta(layer, info)
    try:
        yield
    finally:
        for layer in model.modules():
            info = layerwise.get_layerwise_info(layer)
            layerwise._place_kernel_tensors(layer, info)
            info.reset()


@contextmanager
def layerwise_reload(model: nn.Module, model_config: Any) -> Iterator[None]:
    """Inside, `model.load_weights` replaces the weights of a running engine.

    If the body raises, the engine is whole again but holds a mixture of old and new layers.
    """
    layerwise.initialize_layerwise_reload(model)
    try:
        yield
        layerwise.finalize_layerwise_reload(model, model_config)
    except BaseException:
        _abort_reload(model)
        raise


def _abort_reload(model: nn.Module) -> None:
    """Put the storage back into every layer that waits for weights.

    Without it, the next reload dies of an AttributeError on a parameter that has no loader.
    """
    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load():
            if info.kernel_tensors is not None:
                layerwise._place_kernel_tensors(layer, info)
            info.reset()
    layerwise.LOADING_LAYERS.clear()
    model._do_torchao_reload = model._original_do_torchao_reload
