"""Jobs for `run_distributed` about the load balancing of routers, and transformers' word on it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import LossSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, write_weights
from tests.helpers.tiny_moe_engine import split_experts


def balance_job(
    config: ExperimentConfig, sequences: list[LossSequence], weights: Path
) -> dict[str, Any]:
    """One optimizer step; the final HF tensors go to `weights`."""
    policy = build_policy(config)
    result = policy.train_step(sequences, OBJECTIVE)
    write_weights(policy, weights)
    return {
        "skipped": result.skipped,
        "grad_norm": result.grad_norm,
        "metrics": result.metrics,
        "loads": policy._balance._loads,
        "biases": biases(policy),
    }


def upstream_job(config: ExperimentConfig, sequences: list[LossSequence], weights: Path) -> None:
    """As `balance_job`, with routers that nothing surrounds."""
    policy = build_policy(config)
    for layers in policy._balance._layers.values():
        for layer in layers:
            del layer.router.routing  # of the instance: that of the class is upstream's
    policy._balance = None
    policy.train_step(sequences, OBJECTIVE)
    write_weights(policy, weights)


def life_of_a_bias_job(
    config: ExperimentConfig, sequences: list[LossSequence], checkpoint: Path
) -> tuple[dict[str, dict[int, Tensor]], list[int]]:
    """The selection biases after each of the things that a policy does, and the number of choices
    that each layer has counted in the last step."""
    policy = build_policy(config)
    after = {"start": biases(policy)}
    policy.compute_logprobs(sequences)
    policy.compute_reference_logprobs(sequences)
    after["passes without gradient"] = biases(policy)
    spoiled = [
        replace(s, tensors=s.tensors | {"advantages": s.tensors["advantages"] / 0})
        for s in sequences
    ]
    assert policy.train_step(spoiled, OBJECTIVE).skipped
    after["a skipped step"] = biases(policy)
    policy.train_step(sequences, OBJECTIVE)
    after["a step"] = biases(policy)
    policy.save(checkpoint, {})
    policy.train_step(sequences, OBJECTIVE)
    after["two steps"] = biases(policy)
    counted = policy._balance._loads.sum(dim=1).tolist()
    policy.load(checkpoint)
    after["going back"] = biases(policy)
    return after, counted


def biases(policy: Policy) -> dict[int, Tensor]:
    """By the column of the layer, those of this rank."""
    return {
        layer.column: layer.router.expert_bias.clone()
        for layers in policy._balance._layers.values()
        for layer in layers
        if layer.router.expert_bias is not None
    }


@dataclass(frozen=True)
class Balance:
    """What plain autograd says, sequence by sequence, without any padding."""

    gradient: dict[str, Tensor]
    """Of both losses with their coefficients, by the names of a checkpoint."""
    aux_loss: float
    z_loss: float
    loads: Tensor
    """[MoE layers, experts], by the biased choice."""


def balance_by_transformers(
    path: Path, sequences: list[LossSequence], *, aux_coef: float, z_coef: float
) -> Balance:
    """Of a softmax or sigmoid router whose choice is not limited to groups."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    inputs: list[Tensor] = []
    for gate in gates:
        gate.register_forward_pre_hook(lambda gate, args: inputs.append(args[0]))
    aux = z = torch.zeros(())
    loads = torch.zeros(len(gates), gates[0].weight.size(0), dtype=torch.int64)
    for sequence in sequences:
        inputs.clear()
        model(sequence.input_ids[None])
        for layer, (gate, hidden) in enumerate(zip(gates, inputs, strict=True)):
            logits = hidden.flatten(0, -2) @ gate.weight.T
            top_k = model.config.num_experts_per_tok
            shares, biased = _scores(logits, gate)
            f = _count(shares, top_k) * shares.size(1) / (top_k * sequence.length)
            aux = aux + (f * shares.mean(dim=0)).sum()
            z = z + logits.logsumexp(dim=1).square().sum()
            loads[layer] += _count(biased, top_k)
    tokens = sum(sequence.length for sequence in sequences)
    aux, z = aux / len(sequences), z / tokens
    (aux_coef * aux + z_coef * z).backward()
    gradient: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient |= split_experts(name, grad)
    return Balance(gradient, aux.item() / len(gates), z.item() / len(gates), loads)


def _scores(logits: Tensor, gate: nn.Module) -> tuple[Tensor, Tensor]:
    """[tokens, experts] that add up to 1 for a token, and those that decide where it goes."""
    if not hasattr(gate, "e_score_correction_bias"):
        return logits.softmax(dim=1), logits
    scores = logits.sigmoid()
    return scores / scores.sum(dim=1, keepdim=True), scores + gate.e_score_correction_bias


def _count(scores: Tensor, top_k: int) -> Tensor:
    """[experts] tokens that have each among their best."""
    return scores.topk(top_k, dim=1).indices.flatten().bincount(minlength=scores.size(1))
