"""Biases of experts under tensor parallelism, where megatron-core 0.19 is wrong or refuses them."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
)
from torch import Tensor
from torch.utils._pytree import tree_map


def prepare_expert_biases(chunk: torch.nn.Module) -> None:
    """Call once, when the chunk is built; does nothing to experts without biases."""
    for name, module in chunk.named_modules():
        biases = [x for kind, x in module.named_parameters(recurse=False) if "bias" in kind]
        if ".experts." not in name or not biases:
            continue
        for bias in biases:
            # Upstream would sum the gradients of a tensor-parallel group, which either has other
            # experts on each rank or has summed them already.
            bias.sequence_parallel = False
        if isinstance(module, RowParallelLinear):
            # Skip the sum over the one rank there is at etp = 1, ep = 1: it returns a view, to
            # which the caller cannot add in place. Otherwise this is set already.
            module.explicit_expert_comm = True
        if name.endswith(".linear_fc2"):
            module.register_forward_hook(_keep_bias_on_one_rank)


def _keep_bias_on_one_rank(module: torch.nn.Module, inputs: Any, result: Any) -> Any:
    """Output and biases of `linear_fc2`, which upstream adds on each rank before it sums them."""
    group = parallel_state.get_expert_tensor_parallel_group()
    if group.size() == 1:
        return result

    def share(bias: Tensor) -> Tensor:
        # All ranks get the gradient of the one that adds it.
        whole: Tensor = copy_to_tensor_model_parallel_region(bias, group=group)
        return whole if group.rank() == 0 else 0 * whole

    output, biases = result
    return output, tree_map(share, biases)
