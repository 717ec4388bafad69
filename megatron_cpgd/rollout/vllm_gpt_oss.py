"""What gpt-oss needs of vLLM 0.25 beyond the other models: a complete refresh, and sinks on CPU.

vLLM's model (vllm/model_executor/models/gpt_oss.py) copies experts and sinks into its parameters
without calling their `weight_loader`. The layerwise reload does not notice, keeps the old ones and
says nothing.
"""

from typing import Any

import torch
import vllm._custom_ops
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload import layerwise

_COPIED = ("sinks", "w13_weight", "w13_bias", "w2_weight", "w2_bias")


class _ReportingParameter(nn.Parameter):
    """Passes what is copied to it, or to its `data`, to its `weight_loader`."""

    weight_loader: Any

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self

    def copy_(self, value: Tensor) -> Tensor:  # type: ignore[override]
        self.weight_loader(self, value)
        return self


def report_copies(model: nn.Module) -> None:
    """Let a layerwise reload that has just begun see what gpt-oss copies; a no-op for others."""
    if type(model).__name__ != "GptOssForCausalLM":
        return
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name in _COPIED:
                reporting: Any = parameter
                reporting.weight_loader = _fill
                reporting.weight_loader = layerwise.make_online_process_loader(layer, name)
                reporting.__class__ = _ReportingParameter


@torch.no_grad()
def _fill(param: Any, loaded_weight: Tensor) -> None:
    """The loader behind the one of the reload, which passes arguments by these names."""
    if not param.is_meta:
        param.__class__ = nn.Parameter
    Tensor.copy_(param, loaded_weight)


def writable(name: str, tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the model writes zeros to what it is given (tp > 1)."""
    return tensor.clone() if name.endswith(".down_proj_bias") else tensor


def round_sinks_on_cpu() -> None:
    """vLLM's attention on CPU takes sinks in bfloat16 only, whatever the model has."""
    attention = vllm._custom_ops.cpu_attention_with_kv_cache

    def rounded(*args: Any, s_aux: Tensor | None, **kwargs: Any) -> None:
        attention(*args, s_aux=None if s_aux is None else s_aux.bfloat16(), **kwargs)

    vllm._custom_ops.cpu_attention_with_kv_cache = rounded
