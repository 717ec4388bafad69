"""What this system adds to the Worker of vLLM, see engine argument `worker_extension_cls`."""

from megatron_cpgd.rollout.route_reporter import RouteReporter
from megatron_cpgd.rollout.weight_receiver import WeightReceiver


class WorkerExtension(WeightReceiver, RouteReporter):
    """Methods that vLLM mixes in and `collective_rpc` calls."""
