"""What this system adds to the Worker of vLLM, see engine argument `worker_extension_cls`."""

from megatron_cpgd.rollout.fp8_emulation import offer_emulation
from megatron_cpgd.rollout.route_reporter import RouteReporter
from megatron_cpgd.rollout.vllm_gpt_oss import round_sinks_on_cpu
from megatron_cpgd.rollout.weight_receiver import WeightReceiver

offer_emulation()  # vLLM imports this module in every worker before it builds the model


class WorkerExtension(WeightReceiver, RouteReporter):
    """Methods that vLLM mixes in and `collective_rpc` calls."""


round_sinks_on_cpu()  # every worker imports this file before it makes the model
