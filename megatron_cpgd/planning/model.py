"""A model as the formulas see it: parameters by layer and by how they are cut, FLOPs, KV cache.

All sizes come from the weight table (`weights/architectures.py`), so they are those of the tensors
that are loaded.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from megatron_cpgd.weights.decoder import Decoder
from megatron_cpgd.weights.quantize import Tensors, quantized_tensors
from megatron_cpgd.weights.registry import read_decoder, weight_table
from megatron_cpgd.weights.table import Entry, Split, WeightTable
from megatron_cpgd.weights.tensor_file import tensor_bytes


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the global model."""

    shape: tuple[int, ...]
    split: Split
    expert: bool
    trained: bool
    """False: a buffer, which has neither gradient nor optimizer state."""
    linear: bool
    """A matrix that may be multiplied in FP8; routers are not."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Model:
    """A Hugging Face model."""

    decoder: Decoder
    top_k: int
    """Experts that see a token; 0: the model is dense."""
    layers: tuple[Counter[Parameter], ...]
    """Parameters of each layer, with how many there are of each kind; equal layers are one object,
    so that sums over them can be kept."""
    checkpoint_bytes: Mapping[str, int]
    """Of all tensors as the engine reads them, by the number format of its weights."""

    @property
    def vocab_matrix(self) -> int:
        """Elements of the embedding, and of the head."""
        return self.decoder.vocab * self.decoder.hidden

    @property
    def parameters(self) -> int:
        """All trained parameters, a tied head once."""
        heads = 1 if self.decoder.tied else 2
        inside = sum(_elements(layer) for layer in self.layers)
        return inside + heads * self.vocab_matrix + self.decoder.hidden

    @property
    def expert_parameters(self) -> int:
        """Of them, those of experts."""
        return sum(
            each.elements * count
            for layer in self.layers
            for each, count in layer.items()
            if each.expert
        )

    @cached_property
    def layer_matmuls(self) -> tuple[tuple[int, int], ...]:
        """Of each layer: (elements of dense matrices, of the experts' that one token meets)."""
        return tuple(self._matmuls(layer) for layer in self.layers)

    def _matmuls(self, layer: Counter[Parameter]) -> tuple[int, int]:
        dense, experts = 0, 0
        for parameter, count in layer.items():
            if len(parameter.shape) != 2:
                continue
            if parameter.expert:
                experts += parameter.elements * count
            else:
                dense += parameter.elements * count
        if self.decoder.experts is None:
            return dense, 0
        return dense, experts * self.top_k // self.decoder.experts.count

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that one token is multiplied with, head included."""
        return sum(map(sum, self.layer_matmuls)) + self.vocab_matrix

    @property
    def attention_width(self) -> int:
        """Products per pair of tokens and layer: over all heads, of a query with a key and of a
        weight with a value."""
        decoder = self.decoder
        if decoder.latent is None:
            return 2 * decoder.heads * decoder.head_dim
        latent = decoder.latent
        return decoder.heads * (latent.qk_head_dim + latent.rotary_dim + latent.v_head_dim)

    def forward_flops(self, tokens: float, length: float) -> float:
        """Of one forward pass over `tokens` tokens in sequences of `length`.

        2 per token and matrix element; attention, causal: 2 * width * length / 2 per token and
        layer (arXiv:2205.05198, appendix A, without its vocabulary term of the backward pass).
        """
        attention = self.decoder.layers * self.attention_width * length
        return tokens * (2 * self.active_parameters + attention)

    def train_flops(self, tokens: float, length: float) -> float:
        """Of forward and backward, 3 times the forward; nothing is computed twice."""
        return 3 * self.forward_flops(tokens, length)

    def kv_bytes(self, tp: int, element: int) -> float:
        """Bytes of the KV cache per token, of one of the engine's `tp` ranks."""
        decoder = self.decoder
        if decoder.latent is not None:  # the compressed form is on every rank
            return decoder.layers * (decoder.latent.kv_rank + decoder.latent.rotary_dim) * element
        heads = max(decoder.kv_heads / tp, 1)
        return 2 * decoder.layers * heads * decoder.head_dim * element


def read_model(hf: Mapping[str, Any]) -> Model:
    """The model of a parsed config.json.

    Raises:
        ConversionError: the architecture or one of its options is not supported.
    """
    decoder = read_decoder(hf)
    layers: list[Counter[Parameter]] = [Counter() for _ in range(decoder.layers)]
    table = weight_table(hf)
    for entry in table.entries:
        found = re.match(r"decoder\.layers\.(\d+)\.", entry.name)
        if found:
            layers[int(found[1])][_parameter(entry)] += 1
    same: dict[Any, Counter[Parameter]] = {}
    shared = tuple(same.setdefault(frozenset(layer.items()), layer) for layer in layers)
    top_k = int(hf.get("num_experts_per_tok") or 0) if decoder.experts else 0
    return Model(
        decoder=decoder, top_k=top_k, layers=shared, checkpoint_bytes=_checkpoint_bytes(table)
    )


def _checkpoint_bytes(table: WeightTable) -> dict[str, int]:
    bf16 = table.hf_tensors(torch.bfloat16)
    return {
        "bf16": _tensor_bytes(bf16),
        "fp32": _tensor_bytes(table.hf_tensors(torch.float32)),
        "fp8_block": _tensor_bytes(quantized_tensors(bf16)),
    }


def _tensor_bytes(tensors: Tensors) -> int:
    return sum(tensor_bytes(dtype, shape) for dtype, shape in tensors.values())


def _elements(layer: Counter[Parameter]) -> int:
    return sum(each.elements * count for each, count in layer.items() if each.trained)


def _parameter(entry: Entry) -> Parameter:
    trained = not entry.name.endswith("router.expert_bias")
    linear = len(entry.shape) == 2 and not entry.name.endswith("router.weight")
    return Parameter(entry.shape, entry.split, entry.expert, trained, linear)
