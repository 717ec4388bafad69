"""What depends on private names of vLLM 0.25: a new vLLM is adapted here, in `vllm_gpt_oss.py` and
in `fp8_emulation.py`.

The reload works layer by layer (vllm/model_executor/model_loader/reload/layerwise.py): all
parameters move to the meta device, a layer whose weights have all arrived is built, post-processed
and copied into the storage that the engine uses. It has no rollback, so one is added here.

Routes are captured where a router of vllm/model_executor/layers/fused_moe/router has chosen. A
"monolithic" kernel chooses for itself and the routes stay all 0 without a word; on CPU there is no
other kind.

Latent attention on CPU: vLLM has no kernel for it, but computes it with full heads when told not to
use such kernels. Its norm and RoPE kernels for CPU then give wrong numbers without a word: the norm
takes a slice of a wider tensor (the latent) for contiguous, RoPE turns the first head only. Both
have plain PyTorch behind them, which is right.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import cpu_fused_moe
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import get_num_experts
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.meta import restore_layer_on_meta
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import utils as models_utils
from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.utils.network_utils import get_distributed_init_method, get_open_port
from vllm.utils.torch_utils import set_default_torch_dtype

from megatron_cpgd.rollout import vllm_gpt_oss

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


def keep_fp8_factors() -> None:
    """Keep vLLM from quantising FP8 weights once more.

    DeepGEMM can round the factors of blocks to powers of two, and vLLM makes it do so by default.
    Hopper multiplies by any factor; Blackwell's kernels take no others.
    """
    capability = current_platform.get_device_capability()
    if capability is not None and capability.major < 10:
        os.environ.setdefault("VLLM_USE_DEEP_GEMM_E8M0", "0")


def runs_fp8_experts() -> bool:
    """Whether experts can be in blocks of FP8; for dense layers see `fp8_emulation`."""
    return not runs_on_cpu() or torch.cpu._is_amx_tile_supported()


def reads_fp8_blocks(vllm_config: Any) -> bool:
    """Whether the engine's linear layers take blocks of FP8."""
    return getattr(vllm_config.quant_config, "weight_block_size", None) is not None


def engine_arg_names() -> set[str]:
    """Names that `vllm.LLM` accepts."""
    return {field.name for field in fields(EngineArgs)}


def has_experts(model_dir: str, *, trust_remote_code: bool) -> bool:
    """Whether the model's configuration names a number of experts."""
    config = get_config(model_dir, trust_remote_code=trust_remote_code)
    try:
        get_num_experts(config.get_text_config())
    except ValueError:
        return False
    return True


def has_latent_attention(model_dir: str, *, trust_remote_code: bool) -> bool:
    """Whether the model's keys and values come from a common latent (MLA)."""
    config = get_config(model_dir, trust_remote_code=trust_remote_code).get_text_config()
    return getattr(config, "kv_lora_rank", None) is not None


def latent_attention_on_cpu() -> dict[str, Any]:
    """Arguments of `vllm.LLM` without which it is refused or wrong; sets a variable of vLLM too."""
    os.environ["VLLM_MLA_DISABLE"] = "1"
    return {"compilation_config": {"custom_ops": ["-rms_norm", "-rotary_embedding"]}}


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
    vllm_gpt_oss.report_copies(model)
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


def build_rank(
    folder: Path, *, rank: int, size: int, stage: int, stages: int, expert_parallel: bool
) -> nn.Module:
    """The model of one of `size` tensor-parallel ranks of a pipeline stage, on the meta device.

    The process is alone and only believes that it is that rank.
    """
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=128
    )
    config = arguments.create_engine_config()
    sizes = config.parallel_config
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            address = get_distributed_init_method("127.0.0.1", get_open_port())
            parallel_state.init_distributed_environment(1, 0, address, 0, "gloo")
        parallel_state.destroy_model_parallel()  # that of another rank, or of another kind of model
        parallel_state.initialize_model_parallel()
        sizes.tensor_parallel_size, sizes.pipeline_parallel_size = size, stages
        sizes.world_size, sizes.rank = size * stages, stage * size + rank
        sizes.enable_expert_parallel = expert_parallel
        models_utils._model_to_pp_missing_layer_names.clear()  # by the id of a model, used again
        _pretend(parallel_state.get_tp_group(), rank, size)
        _pretend(parallel_state.get_pp_group(), stage, stages)
        if parallel_state._EP is not None:
            _pretend(parallel_state._EP, rank, size)
        with torch.device("meta"), set_default_torch_dtype(torch.bfloat16), _expert_maps_on_cpu():
            model: nn.Module = initialize_model(vllm_config=config)
            return model


def _pretend(group: parallel_state.GroupCoordinator, rank: int, size: int) -> None:
    """Make a group of this process alone look like a larger one."""
    group.ranks, group.rank = list(range(size)), rank
    group.world_size, group.rank_in_group = size, rank


@contextmanager
def _expert_maps_on_cpu() -> Iterator[None]:
    """Inside, the map of an expert-parallel rank has values whatever the default device."""
    build = ExpertMapManager.__init__

    def build_on_cpu(*args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            build(*args, **kwargs)

    ExpertMapManager.__init__ = build_on_cpu
    try:
        yield
    finally:
        ExpertMapManager.__init__ = build


def moe_layers(vllm_config: Any) -> dict[int, MoERunner]:
    """The MoE layers of this process by their place in the model, ascending."""
    modules = vllm_config.compilation_config.static_forward_context.values()
    layers = {module.layer_id: module for module in modules if isinstance(module, MoERunner)}
    return dict(sorted(layers.items()))


def route_sizes(layer: MoERunner) -> tuple[int, int]:
    """Experts that each token goes to, and experts that there are."""
    return layer.moe_config.experts_per_token, layer.moe_config.num_logical_experts


def report_routes(layer: MoERunner) -> None:
    """Make sure that this layer reports its choice of experts to `layer.router.capture_fn`.

    Raises:
        ValueError: it cannot.
    """
    experts = layer.routed_experts
    if getattr(layer.router, "capture_fn", None) is None:
        raise ValueError(f"{type(layer.router).__name__} does not report its choice")
    if not experts.quant_method.is_monolithic:
        return
    if not current_platform.is_cpu():
        raise ValueError("its kernel chooses the experts itself and does not report them")
    experts.forward_monolithic = _report_choice(experts.forward_monolithic, layer.router.capture_fn)


def _report_choice(forward: Callable[..., Any], report: Callable[[Any], None]) -> Any:
    """A `forward_monolithic` whose call of cpu_fused_moe.select_experts is listened to."""

    def reporting_forward(*args: Any, **kwargs: Any) -> Any:
        select = cpu_fused_moe.select_experts

        def select_and_report(*args: Any, **kwargs: Any) -> Any:
            weights, experts = select(*args, **kwargs)
            report(experts)
            return weights, experts

        cpu_fused_moe.select_experts = select_and_report
        try:
            return forward(*args, **kwargs)
        finally:
            cpu_fused_moe.select_experts = select

    return reporting_forward
