"""Supervised training of a tiny Qwen3 or Qwen3-MoE on worked examples, in plain PyTorch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_cpgd.demo.recipe import WarmupSettings

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens without loss, the default of torch's cross entropy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Corpus:
    """Tokenized worked examples, padded on the right."""

    input_ids: Tensor
    """[N, L] int64."""
    labels: Tensor
    """[N, L] int64; `IGNORED` on prompts and padding."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, experts: int = 0) -> PreTrainedModel:
    """Qwen3 with 2 layers, 127 424 parameters in float32, random weights fixed by `seed`.

    Heads, KV heads and the vocabulary are even, so that two tensor-parallel ranks can share them.

    Args:
        experts: 0, or this many instead of each MLP (8: 251 328 parameters in all); top-2 routing.
    """
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": tokenizer.model_max_length,
        # The usual 0.02 suits wide models; at width 64 it delays learning by many steps.
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",
    }
    torch.manual_seed(seed)
    model: PreTrainedModel
    if experts:
        sizes |= {
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[tuple[str, str]],
    settings: WarmupSettings,
    seed: int,
) -> None:
    """Train `model` in place on (prompt, response) pairs; only responses carry loss."""
    corpus = _tokenize(tokenizer, examples)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95))
    schedule = LambdaLR(optimizer, lambda step: _lr_factor(step, settings))
    model.train()
    for step in range(settings.steps):
        rows = torch.randint(len(examples), (settings.batch_size,), generator=generator)
        loss = _loss(model, corpus.input_ids[rows], corpus.labels[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            logger.info("warm-up step %d of %d: loss %.3f", step + 1, settings.steps, loss.item())
    model.eval()


@torch.inference_mode()
def respond(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    greedy: bool,
    max_new_tokens: int = 16,
) -> list[str]:
    """One response per prompt, sampled at temperature 1 or greedy. Prompts are of equal length."""
    rendered = [render_prompt(tokenizer, prompt) for prompt in prompts]
    input_ids = torch.tensor([tokenizer.encode(text) for text in rendered])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=not greedy,
        max_new_tokens=max_new_tokens,
    )
    responses = output[:, input_ids.shape[1] :]
    return list(tokenizer.batch_decode(responses, skip_special_tokens=True))


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """The user message and the opening of the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return str(text)


def _tokenize(tokenizer: PreTrainedTokenizerFast, examples: Sequence[tuple[str, str]]) -> _Corpus:
    input_ids, labels = [], []
    for prompt, response in examples:
        prompt_ids = tokenizer.encode(render_prompt(tokenizer, prompt))
        response_ids = [*tokenizer.encode(response), tokenizer.eos_token_id]
        input_ids.append(torch.tensor(prompt_ids + response_ids))
        labels.append(torch.tensor([IGNORED] * len(prompt_ids) + response_ids))
    pad = torch.nn.utils.rnn.pad_sequence
    return _Corpus(
        input_ids=pad(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        labels=pad(labels, batch_first=True, padding_value=IGNORED),
    )


def _loss(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    # Padding stands on the right of causal attention: no mask is needed.
    logits = model(input_ids=input_ids[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def _lr_factor(step: int, settings: WarmupSettings) -> float:
    rise = (step + 1) / settings.rise_steps
    fall = (settings.steps - step) / settings.steps
    return min(rise, fall)
