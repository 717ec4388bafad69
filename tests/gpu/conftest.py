import pytest
import torch

from megatron_cpgd.config.schema import ParallelConfig
from megatron_cpgd.policy.parallel import init_model_parallel


@pytest.fixture(scope="module", autouse=True)
def world():
    """A world of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    init_model_parallel(ParallelConfig(), seed=0)
    yield
    torch.distributed.destroy_process_group()
