"""A second engine on plain transformers: slow, in this process, and independent of vLLM.

It checks what training has exported; training itself never uses it.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.rollout.engine import RefreshReport, Sampling
from megatron_cpgd.rollout.routes import pack_routes
from megatron_cpgd.types import Rollout, RouteLayout, Routes

BATCH = 64
"""Prompts of one generate call."""


class TransformersEngine:
    """A RolloutEngine that holds the weights of one folder and never others."""

    def __init__(
        self, model_dir: Path, *, dtype: Literal["bf16", "fp32"], trust_remote_code: bool = False
    ) -> None:
        """Load the model.

        Args:
            model_dir: Hugging Face checkpoint.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        ).eval()

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        """See RolloutEngine.generate; all prompts draw from one stream, `seeds` are refused."""
        if seeds is not None or version != 0:
            raise RolloutError(f"this engine has no seeds per prompt and no {version=}, only 0")
        torch.manual_seed(sampling.seed or 0)
        batches = (prompts[i : i + BATCH] for i in range(0, len(prompts), BATCH))
        groups = [rollouts for batch in batches for rollouts in self._generate(batch, sampling)]
        if not sampling.return_routes:
            return groups
        return [
            [
                replace(each, routes=read_routes(self._model, prompt + each.token_ids))
                for each in group
            ]
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        """Raises RolloutError: this engine checks one folder."""
        raise RolloutError("the transformers engine cannot take new weights")

    def sleep(self) -> None:
        """Raises RolloutError: this engine takes no weights, so it cannot give them up."""
        raise RolloutError("the transformers engine cannot sleep")

    def close(self) -> None:
        """Let the weights go."""
        self._model = None

    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[list[Rollout]]:
        width = max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        greedy = sampling.temperature == 0
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        output = self._model.generate(
            torch.tensor(padded),
            attention_mask=(torch.arange(width) >= width - lengths[:, None]).long(),
            do_sample=not greedy,
            **({} if greedy else drawn | {"top_k": max(sampling.top_k, 0)}),
            num_return_sequences=sampling.n,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=sampling.stop_token_ids,
            pad_token_id=sampling.stop_token_ids[0],
            return_dict_in_generate=True,
            output_scores=True,
        )
        logprobs = self._model.compute_transition_scores(
            output.sequences, output.scores, normalize_logits=True
        )
        responses = output.sequences[:, width:]
        flat = [
            _rollout(tokens, values, sampling)
            for tokens, values in zip(responses, logprobs, strict=True)
        ]
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]


def _rollout(tokens: Tensor, logprobs: Tensor, sampling: Sampling) -> Rollout:
    """The response up to its first end token; generate pads the rest of the row."""
    ends = torch.isin(tokens, torch.tensor(sampling.stop_token_ids)).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(tokens)
    return Rollout(
        token_ids=tokens[:length].tolist(),
        logprobs=logprobs[:length].tolist(),
        finish_reason="stop" if len(ends) else "length",
        weight_version=0,
    )


@torch.no_grad()
def read_routes(model: Any, token_ids: list[int]) -> Routes:
    """Where the routers of a transformers model send the tokens of a prompt and its response.

    For routers that take the largest of a softmax, like those of Qwen-MoE and Mixtral.

    Raises:
        RolloutError: the model has no router.
    """
    names = "\n".join(name for name, _ in model.named_parameters())
    layers = sorted(
        {int(i) for i in re.findall(r"^model\.layers\.(\d+)\..*\bexperts\.", names, re.M)}
    )
    if not layers:
        raise RolloutError(f"asked for the routes of {type(model).__name__}: it has no experts")
    inputs = torch.tensor([token_ids[:-1]])
    logits = torch.stack(model(inputs, output_router_logits=True).router_logits, dim=1)
    layout = RouteLayout(
        layers=layers, top_k=model.config.num_experts_per_tok, num_experts=logits.shape[-1]
    )
    # In float32, as the routers do it: rounding may decide between almost equal experts.
    chosen = logits.softmax(-1, dtype=torch.float32).topk(layout.top_k).indices
    return pack_routes(chosen.numpy(), layout, tokens=len(token_ids))
