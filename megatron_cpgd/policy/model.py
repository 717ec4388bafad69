"""TransformerConfig -> this rank's GPTModel chunks."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cpgd.policy.cpu_layers import use_cpu_layers
from megatron_cpgd.policy.expert_bias import prepare_expert_biases
from megatron_cpgd.policy.latent_attention import use_latent_attention
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.rope import rope_arguments
from megatron_cpgd.weights.placement import padded_vocab_size


def build_chunks(
    config: TransformerConfig, hf: dict[str, Any], info: ParallelInfo
) -> list[GPTModel]:
    """This rank's pipeline chunks, one per virtual stage, weights not yet loaded."""
    on_gpu = torch.cuda.is_available()
    chunks = []
    for stage in range(info.vpp_size):
        vp_stage = stage if info.vpp_size > 1 else None
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=on_gpu, normalization="RMSNorm", vp_stage=vp_stage
        )
        if config.multi_latent_attention:
            use_latent_attention(spec, config.q_lora_rank)
        chunk = GPTModel(
            config,
            spec if on_gpu else use_cpu_layers(spec),
            vocab_size=padded_vocab_size(hf["vocab_size"], info.tp_size),
            max_sequence_length=hf["max_position_embeddings"],
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=parallel_state.is_pipeline_last_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            share_embeddings_and_output_weights=hf.get("tie_word_embeddings", False),
            vp_stage=vp_stage,
            **rope_arguments(hf),
        )
        prepare_expert_biases(chunk)
        for name, parameter in chunk.named_parameters():
            if name.endswith(".softmax_offset"):
                # Cut by heads; else the gradient norm has the sinks of the first rank only.
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        chunks.append(chunk.cuda() if on_gpu else chunk)
    return chunks


def wrap_precision(config: TransformerConfig, chunk: GPTModel) -> torch.nn.Module:
    """The chunk in bf16, if asked for; its weights are to be loaded afterwards."""
    if not config.bf16:
        return chunk  # type: ignore[no-any-return]
    wrapped: torch.nn.Module = Float16Module(config, chunk)
    for module in chunk.modules():
        if isinstance(module, Router):
            module._maintain_float32_expert_bias()  # else upstream does it after the first rounding
    return wrapped
