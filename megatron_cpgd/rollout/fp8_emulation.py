"""FP8 weights on a CPU without a kernel for them: they are restored before every product.

vLLM's own kernel for blocks of FP8 needs AMX (vllm/model_executor/kernels/linear/scaled_mm/cpu.py).
This one stands in where there is none. It gives the numbers of FP8 weights, in time and memory of
neither: for tests and demonstrations. Activations are not quantised, as in vLLM's kernel.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.platforms import PlatformEnum, current_platform

from megatron_cpgd.weights.quantize import dequantize


class EmulatedFp8Kernel(Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """Restores the weight in every product."""

    apply_input_quant: ClassVar[bool] = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """vLLM asks every kernel in turn."""
        return bool(current_platform.is_cpu()), "is for CPUs"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is packed."""

    def apply_block_scaled_mm(
        self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
    ) -> torch.Tensor:
        """A [T, n] times the transpose of B [m, n], whose factors are Bs."""
        return F.linear(A, dequantize(B, Bs).to(A.dtype))


def offer_emulation() -> None:
    """Let vLLM choose the emulation on a CPU where it has no other kernel."""
    kernels: list[Any] = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if EmulatedFp8Kernel not in kernels:
        kernels.append(EmulatedFp8Kernel)
