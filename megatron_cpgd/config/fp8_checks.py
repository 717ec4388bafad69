"""Can the matrices of this model, in this layout, be multiplied in FP8? From config.json alone.

Training: transformer_engine/pytorch/utils.py:assert_dim_for_fp8_exec, Transformer Engine 2.17.
Rollout: vLLM 0.25 merges matrices that read the same input. It builds one whose parts end inside a
block without a word and multiplies rows by the factors of others; what it does check is
`validate_fp8_block_shape` in vllm/model_executor/layers/quantization/utils/fp8_utils.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cpgd.config.schema import ExperimentConfig

BLOCK = 128
FP8_MULTIPLES = {"blockwise": 16, "tensorwise": 16, "delayed": 16, "mxfp8": 32}
"""Recipe -> what both sizes of every matrix, weights and activations, are multiples of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear layer, as one matrix of output rows and input columns."""

    name: str
    parts: tuple[int, ...]
    """Rows of the Hugging Face matrices that it is made of."""
    columns: int
    cut: Literal["rows", "columns", None]
    """What tensor parallelism cuts."""
    least_rows: int = 0
    """Of each part on a rank of the engine: a KV head is held by several ranks if need be."""
    gated: bool = False
    """Gate and up: Megatron cuts the two one by one."""
    expert: bool = False
    """Of each expert: cut by expert tensor parallelism."""


def check_fp8_switches(config: ExperimentConfig) -> Iterator[str]:
    """Problems of the section `precision` by itself."""
    precision = config.precision
    if precision.recipe is None:
        for name in ("fp8_format", "bf16_layers"):
            if precision.changes(name):
                yield (
                    f"precision.{name}={getattr(precision, name)} does nothing: "
                    f"precision.train={precision.train} is not FP8; remove one of them"
                )
    elif precision.recipe == "delayed" and precision.bf16_layers > 0:
        yield (
            f"precision.bf16_layers={precision.bf16_layers}: Megatron-Core has none with "
            "precision.train=fp8_delayed; set bf16_layers=0 or another recipe"
        )


def check_fp8_sizes(hf: dict[str, Any], path: Path, config: ExperimentConfig) -> Iterator[str]:
    """Problems of a model's sizes.

    Args:
        hf: parsed config.json of a supported architecture.
        path: its folder, for the message.
    """
    precision, layers = config.precision, hf.get("num_hidden_layers", 0)
    if hf["model_type"] == "gpt_oss":
        for name in ("train", "rollout"):
            value = getattr(precision, name)
            if value not in ("bf16", "fp32", None):
                yield f"precision.{name}={value}: is not supported for gpt-oss ({path}); use bf16"
        return
    try:
        matrices = list(_matrices(hf))
    except (KeyError, TypeError, ZeroDivisionError):
        return  # a size is missing, which is reported where the model is built
    if precision.recipe is not None:
        limit = layers // config.parallel.pp
        if precision.bf16_layers > limit:
            yield (
                f"precision.bf16_layers={precision.bf16_layers}: a pipeline stage of {path} has "
                f"{limit} layers; use at most that many"
            )
        for matrix in matrices:
            yield from _training_problems(matrix, config, path)
    if precision.engine_weights == "fp8_block":
        for matrix in matrices:
            yield from _rollout_problems(matrix, config, path)


def _training_problems(matrix: Matrix, config: ExperimentConfig, path: Path) -> Iterator[str]:
    recipe, parallel = config.precision.recipe, config.parallel
    assert recipe is not None
    axis, size = ("etp", parallel.etp) if matrix.expert else ("tp", parallel.tp)
    # Megatron has q, k and v in one matrix, gate and up in one that it cuts twice, and no others.
    whole = matrix.cut == "rows" and not matrix.gated
    rows = [sum(matrix.parts)] if whole else sorted(set(matrix.parts))
    for side, sizes in (("rows", rows), ("columns", [matrix.columns])):
        cut = size if matrix.cut == side else 1
        # A shard that ends inside a block of 128 would make the blocks depend on the layout.
        multiple = BLOCK if recipe == "blockwise" and cut > 1 else FP8_MULTIPLES[recipe]
        for each in sizes:
            if each % cut or each // cut % multiple:
                yield (
                    f"precision.train={config.precision.train}: {matrix.name} of {path} has {each} "
                    f"{side}, with parallel.{axis}={cut} {each / cut:g} on each rank; FP8 needs a "
                    f"multiple of {multiple}; change parallel.{axis} or use another recipe or bf16"
                )


def _rollout_problems(matrix: Matrix, config: ExperimentConfig, path: Path) -> Iterator[str]:
    engine_args = config.rollout.engine_args
    tp = engine_args.get("tensor_parallel_size", 1)
    if matrix.expert and engine_args.get("enable_expert_parallel"):
        tp = 1
    if not isinstance(tp, int) or tp < 1:
        return  # the engine reports it
    cut_rows, cut_columns = (tp if matrix.cut == side else 1 for side in ("rows", "columns"))
    checked: list[float] = []
    if cut_rows > 1 or matrix.expert:
        checked += [max(part / cut_rows, matrix.least_rows) for part in matrix.parts]
    else:
        checked += matrix.parts[:-1]  # the last of several may end inside a block
    if cut_columns > 1:
        checked.append(matrix.columns / cut_columns)
    bad = sorted({size for size in checked if size % BLOCK})
    if bad:
        shown = ", ".join(f"{size:g}" for size in bad)
        yield (
            f"precision.rollout=fp8_block: {matrix.name} of {path} has parts of {shown}, with "
            f"tensor_parallel_size={tp}; vLLM takes multiples of {BLOCK}; change "
            "rollout.engine_args.tensor_parallel_size or use precision.rollout=bf16"
        )


def _matrices(hf: dict[str, Any]) -> Iterator[Matrix]:
    """The linear layers of a decoder layer, each once; routers are not in FP8."""
    yield from _latent_attention(hf) if hf["model_type"] == "deepseek_v3" else _attention(hf)
    mixture = hf["model_type"] in ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3")
    if not mixture or _has_dense_layers(hf):
        yield from _mlp("mlp", hf["intermediate_size"], hf["hidden_size"])
    if mixture:
        width = hf.get("moe_intermediate_size") or hf["intermediate_size"]
        yield from _mlp("mlp.experts", width, hf["hidden_size"], expert=True)
        shared = hf.get("n_shared_experts") or 0
        if shared:
            yield from _mlp("mlp.shared_experts", shared * width, hf["hidden_size"])


def _attention(hf: dict[str, Any]) -> Iterator[Matrix]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    default = 128 if hf["model_type"].startswith("qwen3") else hidden // heads
    head_dim = hf.get("head_dim") or default
    kv = (hf.get("num_key_value_heads") or heads) * head_dim
    query = heads * head_dim
    yield Matrix(
        name="self_attn.qkv_proj", parts=(query, kv, kv), columns=hidden, cut="rows",
        least_rows=head_dim,
    )  # fmt: skip
    yield Matrix(name="self_attn.o_proj", parts=(hidden,), columns=query, cut="columns")


def _latent_attention(hf: dict[str, Any]) -> Iterator[Matrix]:
    hidden, heads, rotated = hf["hidden_size"], hf["num_attention_heads"], hf["qk_rope_head_dim"]
    q_rank, kv_rank = hf["q_lora_rank"], hf["kv_lora_rank"]
    key, value = hf["qk_nope_head_dim"], hf["v_head_dim"]
    down = (kv_rank + rotated,) if q_rank is None else (q_rank, kv_rank + rotated)
    yield Matrix(name="self_attn.q_a_proj, kv_a_proj", parts=down, columns=hidden, cut=None)
    query = ("q_b_proj", heads * (key + rotated), q_rank)
    if q_rank is None:  # queries without a low-rank projection
        query = ("q_proj", heads * (key + rotated), hidden)
    for name, rows, columns in (query, ("kv_b_proj", heads * (key + value), kv_rank)):
        yield Matrix(name=f"self_attn.{name}", parts=(rows,), columns=columns, cut="rows")
    yield Matrix(name="self_attn.o_proj", parts=(hidden,), columns=heads * value, cut="columns")


def _mlp(name: str, width: int, hidden: int, *, expert: bool = False) -> Iterator[Matrix]:
    yield Matrix(
        name=f"{name}.gate_up_proj", parts=(width, width), columns=hidden, cut="rows",
        gated=True, expert=expert,
    )  # fmt: skip
    yield Matrix(
        name=f"{name}.down_proj", parts=(hidden,), columns=width, cut="columns", expert=expert
    )


def _has_dense_layers(hf: dict[str, Any]) -> bool:
    """Of a mixture of experts."""
    return bool(
        hf.get("first_k_dense_replace")
        or hf.get("mlp_only_layers")
        or (hf.get("decoder_sparse_step") or 1) > 1
    )
