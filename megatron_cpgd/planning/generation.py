"""Seconds of sampling a batch: prompts are computed once, then tokens are decoded one by one."""

import math
from dataclasses import dataclass

from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.memory import EngineMemory, EngineSettings
from megatron_cpgd.planning.model import Model
from megatron_cpgd.weights.quantize import BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What is sampled in a step."""

    prompts: int
    samples: int
    """Of each prompt."""
    prompt_tokens: float
    """Mean of a prompt."""
    response_tokens: float
    """Mean of a response."""
    longest: int
    """Bound of a response; some are as long."""

    @property
    def longest_sequence(self) -> float:
        """With its prompt."""
        return self.prompt_tokens + self.longest


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSeconds:
    """Of one batch, on each engine."""

    prefill: float
    decode: float
    concurrent: float
    """Mean number of sequences that are decoded together."""
    iterations: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode


def generation_seconds(
    model: Model, machine: Machine, engine: EngineSettings, memory: EngineMemory, requests: Requests
) -> GenerationSeconds:
    """The batch is spread evenly over the engines.

    As many sequences are decoded together as the cache and `max_num_seqs` allow; there are at least
    as many iterations as the longest response has tokens, at the end for few sequences.
    """
    factor = machine.efficiency.generate_factor
    sequences = requests.prompts * requests.samples / engine.engines
    context = requests.prompt_tokens + requests.response_tokens / 2
    # What one needs at its end is reserved for it, in the mean of many.
    room = max(memory.cache_tokens / (requests.prompt_tokens + requests.response_tokens), 1)
    limit = min(sequences, engine.max_sequences, room)
    tokens = sequences * requests.response_tokens
    iterations = max(tokens / limit, float(requests.longest))
    concurrent = tokens / iterations
    prompts = requests.prompts / engine.engines * requests.prompt_tokens
    prefill = _compute_s(model, machine, engine, prompts, requests.prompt_tokens)
    decode = iterations * iteration_seconds(model, machine, engine, concurrent, context)
    return GenerationSeconds(
        prefill=prefill * factor, decode=decode * factor, concurrent=concurrent,
        iterations=iterations,
    )  # fmt: skip


def iteration_seconds(
    model: Model, machine: Machine, engine: EngineSettings, sequences: float, context: float
) -> float:
    """One token for each of so many sequences: reading weights and cache or computing, whichever
    takes longer; two sums over the engine's GPUs per layer; the engine's own work."""
    efficiency = machine.efficiency
    read = _read_bytes(model, engine, sequences) / engine.tp
    read += sequences * context * model.kv_bytes(engine.tp, engine.cache_element)
    memory_s = read / (machine.bandwidth * efficiency.bandwidth)
    # Every token sees all before it.
    compute_s = _compute_s(model, machine, engine, sequences, 2 * context)
    sums = 2 * model.decoder.layers
    payload = 2 * sequences * model.decoder.hidden * engine.element
    link_s = sums * machine.transfer_s(payload, engine.tp)
    own = efficiency.iteration_s + efficiency.sequence_s * sequences
    return max(memory_s, compute_s) + link_s + own


def _compute_s(
    model: Model, machine: Machine, engine: EngineSettings, tokens: float, length: float
) -> float:
    """One forward pass; attention and head are never in FP8."""
    fp8 = engine.precision == "fp8_block"
    plain = machine.product_rate("fp32" if engine.precision == "fp32" else "bf16")
    low = machine.product_rate("bf16", "fp8") if fp8 else plain
    layers = 2 * tokens * (model.active_parameters - model.vocab_matrix)
    rest = model.forward_flops(tokens, length) - layers
    return (layers / low + rest / plain) / (machine.efficiency.dense * engine.tp)


def _read_bytes(model: Model, engine: EngineSettings, tokens: float) -> float:
    """Bytes of weights that a decoding iteration reads, over all GPUs of the engine."""
    layers = _touched_parameters(model, tokens) - model.vocab_matrix
    of_linear = 1 + 4 / BLOCK**2 if engine.precision == "fp8_block" else engine.element
    return layers * of_linear + model.vocab_matrix * engine.element


def _touched_parameters(model: Model, tokens: float) -> float:
    """Elements that a decoding iteration reads: of the experts, those that some token is sent to,
    if tokens choose evenly."""
    experts = model.decoder.experts
    active = float(model.active_parameters)
    if experts is None:
        return active
    chosen = sum(of_experts for _, of_experts in model.layer_matmuls)
    share = 1 - math.pow(1 - model.top_k / experts.count, tokens)
    return active - chosen + chosen * experts.count / model.top_k * share
