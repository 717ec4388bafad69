"""Multi-latent attention as DeepSeek-V3 computes it, where upstream's differs."""

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mla_qk_norm_config import QKNormConfigResolver
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

INNER_EPSILON = 1e-6
"""Of the norms of the latents, in every model: transformers passes no `rms_norm_eps` to them."""


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """No norm in front of queries without a latent; in the others the epsilon of transformers."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        names = ["kv_layernorm", "linear_kv_up_proj"]
        if config.q_lora_rank is not None:
            names += ["q_layernorm", "linear_q_up_proj"]
        # A norm is a module of its own, or fused into the projection behind it.
        norms = [module for name in names if hasattr(module := getattr(self, name), "eps")]
        assert len(norms) == len(names) // 2, f"{names=} {norms=}"
        for norm in norms:
            norm.eps = INNER_EPSILON

    def _resolve_qk_norm_config(self, submodules: Any) -> Any:
        return _Resolver(self.config, submodules).resolve()


class _Resolver(QKNormConfigResolver):  # type: ignore[misc]
    def _mla_fused_linear_or_default(self, module_spec: Any, module_name: str) -> Any:
        if module_name == "linear_q_proj":  # asked for without a latent of queries only
            return module_spec
        return super()._mla_fused_linear_or_default(module_spec, module_name)


def use_latent_attention(block: Any, q_rank: int | None) -> None:
    """Put our attention into the layers of a `TransformerBlockSubmodules` that have upstream's."""
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is MLASelfAttention:
            attention.module = LatentAttention
            if q_rank is None:
                attention.submodules.q_layernorm = IdentityOp
