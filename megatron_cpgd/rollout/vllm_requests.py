"""Builds vLLM and answers the trainer's requests with it; imported by the engine process only."""

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from vllm import LLM, CompletionOutput, SamplingParams, TokensPrompt

from megatron_cpgd.errors import ConfigError, RolloutError, WeightSyncError
from megatron_cpgd.rollout import vllm_compat
from megatron_cpgd.rollout.engine import check_prompts, stream_seeds
from megatron_cpgd.rollout.messages import (
    Asleep,
    Failed,
    Generate,
    Generated,
    Launch,
    Refresh,
    Refreshed,
    Response,
    Sleep,
)
from megatron_cpgd.rollout.routes import pack_moe_layers
from megatron_cpgd.types import Rollout, RouteLayout
from megatron_cpgd.weights.fingerprint import merge_fingerprints
from megatron_cpgd.weights.quantize import QUANTIZATION_CONFIG

logger = logging.getLogger(__name__)

CPU_ENGINE_ARGS = {
    "enforce_eager": True,
    # With chunked prefill, a seeded request dies of "CPU Generator does not use offset".
    "enable_chunked_prefill": False,
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 256,
}
"""Defaults on CPU; on CUDA vLLM's own ones hold."""
FP8_ENGINE_ARGS: dict[str, Any] = {
    "quantization": "fp8",
    "hf_overrides": {"quantization_config": QUANTIZATION_CONFIG},
    # The folder has the weights in another format: the first refresh brings them.
    "load_format": "dummy",
}
"""An engine for linear layers in blocks of FP8."""
PREFILL_TOKENS = 2048
"""Smallest prefill batch on CPU; vLLM's warm-up computes one of this size."""
NO_ROUTES_WITH = (
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
    "speculative_config",
    "kv_transfer_config",
)
"""Engine arguments other than 1 or null under which vLLM returns no routes, or not all."""


def build_llm(launch: Launch) -> LLM:
    """
    Raises:
        ConfigError: an engine argument is unknown, set by this system, or does not work.
    """
    vllm_compat.require_supported_vllm()
    fixed: dict[str, Any] = {
        "model": launch.model_dir,
        "dtype": "float32" if launch.dtype == "fp32" else "bfloat16",
        "max_model_len": launch.max_model_len,
        "seed": launch.seed,
        "trust_remote_code": launch.trust_remote_code,
        "skip_tokenizer_init": True,
        # The ratio of the loss needs the distribution that was really sampled from.
        "logprobs_mode": "processed_logprobs",
        # Else the model's generation config would add end tokens of its own.
        "generation_config": "vllm",
        "worker_extension_cls": "megatron_cpgd.rollout.worker_extension.WorkerExtension",
        "enable_return_routed_experts": launch.return_routes,
        # On CPU vLLM refuses it; there its `sleep` frees nothing, the rest is the same.
        "enable_sleep_mode": launch.sleeps and not vllm_compat.runs_on_cpu(),
    }
    if vllm_compat.runs_on_cpu() and vllm_compat.has_latent_attention(
        launch.model_dir, trust_remote_code=launch.trust_remote_code
    ):
        fixed |= vllm_compat.latent_attention_on_cpu()
    if launch.dtype == "fp8_block":
        check_fp8_possible(launch)
        fixed |= FP8_ENGINE_ARGS
        vllm_compat.keep_fp8_factors()
    check_engine_args(launch.engine_args, fixed=set(fixed))
    if launch.return_routes:
        check_routes_possible(launch)
    defaults: dict[str, Any] = {"disable_log_stats": True}
    if vllm_compat.runs_on_cpu():
        if launch.engine_args.get("enable_expert_parallel"):
            raise ConfigError(
                "rollout.engine_args.enable_expert_parallel: vLLM crashes with it on CPU, its "
                "kernel ignores which experts are local; use tensor_parallel_size alone"
            )
        defaults |= CPU_ENGINE_ARGS
        defaults["max_num_batched_tokens"] = max(launch.max_model_len, PREFILL_TOKENS)
    try:
        return LLM(**(defaults | launch.engine_args | fixed))
    except ValidationError as error:  # of vLLM's own configuration, before it loads anything
        problems = "; ".join(map(_describe, error.errors()))
        raise ConfigError(f"vLLM refuses the model or rollout.engine_args: {problems}") from error


def _describe(problem: ErrorDetails) -> str:
    where = ".".join(map(str, problem["loc"])) or "settings"
    return f"{where}: {problem['msg']}, got {repr(problem['input'])[:100]}"


def check_engine_args(engine_args: dict[str, Any], *, fixed: set[str]) -> None:
    """
    Raises:
        ConfigError: vLLM has no such argument, or this system sets it.
    """
    known = vllm_compat.engine_arg_names()
    for name in engine_args:
        if name in fixed:
            raise ConfigError(f"rollout.engine_args.{name} is set by megatron_cpgd; remove it")
        if name not in known:
            close = difflib.get_close_matches(name, known)
            raise ConfigError(
                f"rollout.engine_args.{name}: vLLM has no such argument; close ones: {close}"
            )


def check_routes_possible(launch: Launch) -> None:
    """
    Raises:
        ConfigError: the model has no experts, or an engine argument excludes routes.
    """
    if not vllm_compat.has_experts(launch.model_dir, trust_remote_code=launch.trust_remote_code):
        raise ConfigError(
            f"model.path={launch.model_dir}: routes are asked for, but the model has no experts; "
            "only a mixture of experts has routes"
        )
    for name in NO_ROUTES_WITH:
        value = launch.engine_args.get(name)
        if value not in (None, 1):
            raise ConfigError(
                f"rollout.engine_args.{name}={value}: routes are asked for, and vLLM cannot return "
                "them with it; remove it"
            )


def check_fp8_possible(launch: Launch) -> None:
    """
    Raises:
        ConfigError: vLLM has no kernel for experts in FP8 on this machine.
    """
    if not vllm_compat.runs_fp8_experts() and vllm_compat.has_experts(
        launch.model_dir, trust_remote_code=launch.trust_remote_code
    ):
        raise ConfigError(
            "precision.rollout=fp8_block: on a CPU without AMX there is no kernel for experts in "
            "FP8, only an emulation for dense models; use precision.rollout=bf16"
        )


def start_reporting_routes(llm: LLM) -> RouteLayout:
    """
    Raises:
        ConfigError: a layer cannot report its routes.
    """
    receipt, *others = llm.collective_rpc("cpgd_report_routes")
    if "error" in receipt:
        raise ConfigError(
            f"vLLM cannot return the routes of this model: {receipt['error']}; another "
            "rollout.engine_args.moe_backend may"
        )
    assert all(other == receipt for other in others), f"{receipt=} {others=}"
    return RouteLayout(**receipt)


class Engine:
    """vLLM and the version of the weights in it."""

    def __init__(self, llm: LLM, launch: Launch) -> None:
        """
        Args:
            launch: what `llm` was built from.

        Raises:
            ConfigError: the model's layers cannot report their routes.
        """
        self.llm = llm
        self.layout = start_reporting_routes(llm) if launch.return_routes else None
        """Of the routes that the engine returns; None if it was not started for that."""
        self.version = 0
        self.unusable: str | None = None
        """Why nothing is generated until a refresh succeeds."""
        if launch.dtype == "fp8_block":
            self.unusable = "the engine has no weights yet: FP8 weights come with a refresh"
        self.sleeps = launch.sleeps
        """Whether it may be sent to sleep."""
        self.asleep = False
        self.broken = False
        """vLLM raised an unforeseen error: its scheduler may be stuck, the process has to end."""

    def answer(self, request: Generate | Refresh | Sleep) -> Response:
        """Carry out one request; errors become part of the answer."""
        try:
            match request:
                case Generate():
                    return self.generate(request)
                case Refresh():
                    return self.refresh(request)
                case Sleep():
                    return self.sleep()
        except RolloutError as error:
            return Failed(kind="rollout", message=f"{error}")
        except WeightSyncError as error:
            return Failed(kind="weights", message=f"{error}")
        except Exception as error:
            self.broken = True
            logger.exception("request failed")
            return Failed(kind="rollout", message=f"vLLM failed with {error!r}; see its log")

    def generate(self, request: Generate) -> Generated:
        """See RolloutEngine.generate."""
        if self.unusable is not None:
            raise WeightSyncError(self.unusable)
        if request.version != self.version:
            raise RolloutError(
                f"asked for responses of weight version {request.version}, the engine holds "
                f"{self.version}; refresh it first"
            )
        config, sampling = self.llm.llm_engine.model_config, request.sampling
        check_prompts(
            request.prompts,
            max_tokens=sampling.max_tokens,
            vocab_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
        )
        if sampling.return_routes and self.layout is None:
            raise RolloutError("asked for routes, the engine was started without return_routes")
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in request.prompts],
            sampling_params(request),
            use_tqdm=False,
        )
        layout = self.layout if sampling.return_routes else None
        return Generated(
            groups=[
                [rollout(prompt, sample, self.version, layout) for sample in output.outputs]
                for prompt, output in zip(request.prompts, outputs, strict=True)
            ]
        )

    def refresh(self, request: Refresh) -> Refreshed:
        """See RolloutEngine.refresh."""
        try:
            receipt = self._load(request)
        except WeightSyncError as error:
            self.unusable = f"the last weight refresh failed: {error}"
            raise
        self.version, self.unusable = request.version, None
        return receipt

    def sleep(self) -> Asleep:
        """See RolloutEngine.sleep."""
        if not self.sleeps:
            raise RolloutError("asked to sleep, the engine was started without rollout.sleep")
        if not self.asleep:
            # Level 1 would keep a copy of weights on the host that the next refresh replaces.
            self.llm.sleep(level=2)
            self.asleep = True
        self.unusable = "the engine sleeps and has no weights; refresh it first"
        return Asleep()

    def _load(self, request: Refresh) -> Refreshed:
        where = f"weight refresh from version {self.version} to {request.version}"
        if request.version < self.version:
            raise WeightSyncError(f"{where}: versions only grow")
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        receipts = self.llm.collective_rpc("cpgd_refresh", args=(request.arena,))
        errors = [receipt["error"] for receipt in receipts if "error" in receipt]
        if errors:
            raise WeightSyncError(f"{where}: {errors[0]}")
        parts = [receipt.pop("fingerprints") for receipt in receipts]
        if any(receipt != receipts[0] for receipt in receipts):
            raise WeightSyncError(f"{where}: the workers read different tensors: {receipts}")
        # Cached keys and values belong to the old weights.
        if not self.llm.reset_prefix_cache():
            raise WeightSyncError(f"{where}: vLLM did not empty its prefix cache")
        return Refreshed(**receipts[0], fingerprints=merge_fingerprints(parts))


def sampling_params(request: Generate) -> list[SamplingParams]:
    """[P] vLLM's parameters for each prompt."""
    sampling = request.sampling
    prompts = len(request.prompts)
    seeds: Sequence[int | None] | None = stream_seeds(sampling, prompts, request.seeds)
    return [
        SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=sampling.stop_token_ids,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
        )
        for seed in seeds or [None] * prompts
    ]


def rollout(
    prompt: list[int], output: CompletionOutput, version: int, layout: RouteLayout | None
) -> Rollout:
    """vLLM's record as ours; `logprobs=0` reports the sampled token alone at each position.

    Args:
        layout: of the routes to return; None returns none.
    """
    token_ids = list(output.token_ids)
    routes = None
    if layout is not None:
        tokens = len(prompt) + len(token_ids)
        routes = pack_moe_layers(output.routed_experts, layout, tokens=tokens)
    return Rollout(
        token_ids=token_ids,
        logprobs=output.logprobs.logprobs,
        finish_reason=output.finish_reason,
        weight_version=version,
        routes=routes,
    )
