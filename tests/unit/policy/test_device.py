"""The CPU layer of megatron-core: complete for this release, and absent where CUDA is."""

import ast
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_cpgd.policy import device
from tests.helpers.layer_jobs import unequal_parts_job
from tests.helpers.ranks import run_distributed

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the layer is for CPU only")

NOT_ON_OUR_PATH = {
    "distributed.fsdp.mcore_fsdp_adapter": (5, "FSDP is not used"),
    "distributed.fsdp.src.megatron_fsdp.fully_shard": (1, "FSDP is not used"),
    "distributed.fsdp.src.megatron_fsdp.megatron_fsdp": (3, "FSDP is not used"),
    "distributed.fsdp.src.megatron_fsdp.mixed_precision": (1, "FSDP is not used"),
    "distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer": (3, "FSDP is not used"),
    "distributed.fsdp.src.megatron_fsdp.utils": (3, "FSDP is not used"),
    "distributed.param_and_grad_buffer": (1, "NCCL user buffers"),
    "distributed.torch_fully_sharded_data_parallel": (1, "FSDP is not used"),
    "extensions.transformer_engine": (1, "Transformer Engine needs CUDA"),
    "fp8_utils": (2, "FP8 needs Transformer Engine"),
    "full_cuda_graph": (1, "CUDA graphs"),
    "fusions.fused_indices_converter": (4, "Triton kernel of MoE"),
    "inference.contexts.dynamic_context": (12, "upstream's own inference engine"),
    "inference.symmetric_memory": (1, "upstream's own inference engine"),
    "nccl_allocator": (6, "NCCL user buffers"),
    "optimizer.cpu_offloading.hybrid_optimizer": (1, "optimizer offloading"),
    "optimizer.layer_wise_optimizer": (1, "the Muon optimizer"),
    "pipeline_parallel.combined_1f1b": (1, "autocast is off"),
    "pipeline_parallel.fine_grained_activation_offload": (1, "activation offloading"),
    "pipeline_parallel.hybrid_cp_schedule": (1, "hybrid context parallel"),
    "pipeline_parallel.utils": (2, "streams of MoE overlap"),
    "rerun_state_machine": (2, "off unless a trainer starts it"),
    "tensor_parallel.layers": (2, "custom_fwd and custom_bwd act under autocast only"),
    "tensor_parallel.random": (3, "the RNG state functions that the device layer replaces"),
    "transformer.cuda_graphs": (2, "CUDA graphs"),
    "transformer.fsdp_dtensor_checkpoint": (1, "FSDP is not used"),
    "transformer.moe.moe_layer": (1, "delayed weight gradients"),
    "transformer.moe.paged_stash": (3, "CUDA graphs of MoE"),
    "transformer.moe.token_dispatcher": (2, "fused permutation, DeepEP"),
}
"""Module -> (CUDA literals in it, why no run on CPU reaches them)."""
NO_FACTORY = {
    "dist_checkpointing.exchange_utils": (2, "init_data() returns: our tensors have their data"),
    "pipeline_parallel.schedules": (1, "autocast is off"),
}
"""The same for literals in LITERAL_MODULES that replacing factories does not reach."""


def run_python(code: str) -> str:
    """What a fresh interpreter prints: the layer can be installed only once per process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def literals(path: Path) -> Iterator[tuple[str, int, str]]:
    """(function or method called, line, source) of calls with a "cuda" or pin_memory=True."""
    for call in ast.walk(ast.parse(path.read_bytes())):
        if not isinstance(call, ast.Call):
            continue
        values = [*call.args, *(k.value for k in call.keywords if k.arg != "pin_memory")]
        pinned = any(
            k.arg == "pin_memory" and ast.unparse(k.value) == "True" for k in call.keywords
        )
        if pinned or any(_names_cuda(value) for value in values):
            yield ast.unparse(call.func), call.lineno, ast.unparse(call)


def _names_cuda(value: ast.expr) -> bool:
    if isinstance(value, ast.IfExp):
        return _names_cuda(value.body) or _names_cuda(value.orelse)
    if isinstance(value, ast.JoinedStr):
        value = value.values[0]
    text = value.value if isinstance(value, ast.Constant) else None
    return isinstance(text, str) and (text == "cuda" or text.startswith("cuda:"))


@pytest.fixture(scope="module")
def loaded() -> dict[str, Path]:
    """Modules of megatron.core, without that prefix, that importing the policy loads."""
    code = (
        "import json, sys, megatron_cpgd.policy.policy\n"
        "print(json.dumps({n: m.__file__ for n, m in sys.modules.items()"
        " if n.startswith('megatron.core.') and getattr(m, '__file__', None)}))"
    )
    files = json.loads(run_python(code))
    return {name.removeprefix("megatron.core."): Path(file) for name, file in files.items()}


def test_upstream_is_the_release_that_the_layer_was_written_for():
    version = importlib.metadata.version("megatron-core")
    assert version.startswith("0.19."), (
        f"megatron-core {version}: go through every item of device.py's docstring "
        "and tests/unit/policy/test_device.py before you change this line"
    )


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # a docstring of upstream
def test_every_cuda_literal_that_we_load_is_replaced_or_known_to_be_elsewhere(loaded):
    assert set(device.LITERAL_MODULES) <= loaded.keys()
    found = {name: list(literals(file)) for name, file in sorted(loaded.items())}
    surprises = []
    for name, calls in found.items():
        known = NOT_ON_OUR_PATH.get(name, (0, ""))[0]
        if name not in device.LITERAL_MODULES and len(calls) != known:
            lines = "".join(f"\n    {loaded[name]}:{line}: {text}" for _, line, text in calls)
            surprises.append(f"  megatron.core.{name}: {known} expected, {len(calls)} found{lines}")
    assert not surprises, (
        "CUDA literals of megatron-core that nobody has looked at. If a CPU run reaches one, add "
        "the module to device.LITERAL_MODULES; if none does, to NOT_ON_OUR_PATH:\n"
        + "\n".join(surprises)
    )


@pytest.mark.parametrize("name", device.LITERAL_MODULES)
def test_a_replaced_module_has_its_literals_in_factory_calls_that_are_replaced(loaded, name):
    calls = list(literals(loaded[name]))
    assert calls, f"megatron.core.{name} has no CUDA literal any more; take it off the list"
    factories = {f"torch.{factory}" for factory in device._FACTORIES}
    others = [(line, text) for function, line, text in calls if function not in factories]
    known = NO_FACTORY.get(name, (0, ""))[0]
    assert len(others) == known, f"megatron.core.{name}: not tensor factories: {others}"


def test_literals_of_a_replaced_module_make_cpu_tensors_and_torch_itself_stays_strict():
    from megatron.core import utils

    assert utils.torch.zeros(2, device="cuda").device.type == "cpu"
    assert (
        utils.torch.zeros(2, device=torch.device("cuda", 0), pin_memory=True).is_pinned() is False
    )
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")


def test_tensor_type_equals_its_cuda_spelling_and_no_other():
    name = torch.zeros(1).type()
    assert name == "torch.cuda.FloatTensor" and name == "torch.FloatTensor"
    assert name != "torch.cuda.HalfTensor" and name != "torch.HalfTensor"
    assert str(name) == "torch.FloatTensor" and hash(name) == hash("torch.FloatTensor")
    assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_upstream_fuses_nothing_and_torch_compile_is_back_after_the_import():
    code = (
        "import torch; before = torch.compile\n"
        "import megatron_cpgd.policy.policy\n"
        "from megatron.core import jit\n"
        "from megatron.core.fusions.fused_bias_swiglu import swiglu\n"
        "f = lambda x: x\n"
        "fused = hasattr(swiglu, '_torchdynamo_orig_callable')\n"
        "print(torch.compile is before, jit.jit_fuser(f) is f, fused)"
    )
    assert run_python(code) == "True True False"


# What a driver makes work must stay torch's own. is_available() is all that install() asks.
def test_install_changes_nothing_where_cuda_is_available():
    code = """
import sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device: (9, 0)
owners = [torch, torch.cuda, torch.cuda.random, torch.Tensor, torch.nn.Module]
before = [dict(vars(owner)) for owner in owners]
import megatron_cpgd.policy
same = all(vars(o).get(n) is v for o, b in zip(owners, before) for n, v in b.items())
print(same, megatron_cpgd.policy.device._installed, "megatron.core" in sys.modules)
"""
    assert run_python(code) == "True False False"


def test_install_refuses_to_come_after_megatron():
    code = """
import sys, types
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
try:
    import megatron_cpgd.policy
except AssertionError as error:
    print(error)
"""
    assert run_python(code) == "device.install() must run before megatron is imported"


# Rows 0 1 2 | 3 | none on three ranks; the loss weighs row i of rank r's copy by i + 10 r.
def test_unequal_parts_are_gathered_and_their_gradients_summed():
    results = run_distributed(3, unequal_parts_job, [3, 1, 0])
    for whole, _, _ in results:
        assert whole == [0, 1, 2, 3]
    gradients = [gradient for _, gradient, _ in results]
    assert gradients == [[30 + 0, 30 + 3, 30 + 6], [30 + 9], []]  # sum over ranks of i + 10 r
    assert [scattered for _, _, scattered in results] == [[0, 3, 6], [9], []]  # 3 equal copies


def test_split_sizes_leave_tensors_only_where_upstream_asks_for_numbers():
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    sizes = torch.tensor([2, 0])
    for module in (moe_utils, token_dispatcher):
        assert module.maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [2, 0]
        assert not torch.is_tensor(module.maybe_move_tensor_to_cpu(sizes, as_numpy=True))
        assert module.maybe_move_tensor_to_cpu(sizes) is sizes
