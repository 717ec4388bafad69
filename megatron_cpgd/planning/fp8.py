"""What changes where layers multiply in FP8: number formats, and the copies that are kept.

Transformer Engine 2.17 (pytorch/module/linear.py, grouped_linear.py): from the first micro-batch of
a batch on, a layer keeps its weight in FP8 twice, as the forward and as the backward pass read it;
of its input it saves one copy in FP8. Parameters, gradients and everything between the products
stay as they are.
"""

from dataclasses import dataclass

from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.model import Model
from megatron_cpgd.planning.state import local_elements

INPUT_BYTES = {"blockwise": 1 + 4 / 128, "tensorwise": 1.0, "delayed": 1.0, "mxfp8": 1 + 1 / 32}
"""Of a number of a saved input, with its share of a factor, by recipe."""
COPY_BYTES = {"blockwise": 1 + 4 / 128**2, "tensorwise": 1.0, "delayed": 1.0, "mxfp8": 1 + 1 / 32}
"""The same of a weight, in one of its two copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """The settings of `precision.train` and `bf16_layers`."""

    recipe: str
    bf16_layers: int = 0
    """So many layers at either end stay in bf16."""

    @property
    def input_bytes(self) -> float:
        """Of a saved number of a layer's input."""
        return INPUT_BYTES[self.recipe]

    @property
    def format(self) -> str:
        """As `Machine.flops` calls it."""
        return "mxfp8" if self.recipe == "mxfp8" else "fp8"

    def covers(self, layer: int, layers: int) -> bool:
        """Whether this layer of so many multiplies in FP8."""
        return self.bf16_layers <= layer < layers - self.bf16_layers


def weight_copies(model: Model, layout: Layout, stage: int, fp8: Fp8 | None) -> int:
    """Bytes of the FP8 weights that a rank of a stage keeps beside its parameters."""
    if fp8 is None:
        return 0
    layers = model.decoder.layers
    elements = sum(
        local_elements(parameter, layout) * (count // layout.ep if parameter.expert else count)
        for chunk in layout.stage(stage, layers)
        for layer in chunk.layers
        if fp8.covers(layer, layers)
        for parameter, count in model.layers[layer].items()
        if parameter.linear
    )
    return int(2 * COPY_BYTES[fp8.recipe] * elements)
