"""The part of an engine that returns routes that runs inside vLLM's worker processes."""

from typing import Any

from megatron_cpgd.rollout.vllm_compat import moe_layers, report_routes, route_sizes


class RouteReporter:
    """Makes a started engine report the experts that its routers choose."""

    vllm_config: Any

    def cpgd_report_routes(self) -> dict[str, Any]:
        """Let every MoE layer report its choices; called once, after the start.

        Returns:
            `error`, or the fields of RouteLayout, read from the layers themselves.
        """
        layers = moe_layers(self.vllm_config)
        if not layers:
            return {"error": "the model has no MoE layer"}
        for place, layer in layers.items():
            try:
                report_routes(layer)
            except ValueError as error:
                return {"error": f"layer {place}: {error}"}
        sizes = {route_sizes(layer) for layer in layers.values()}
        if len(sizes) > 1:
            return {"error": f"layers differ in (top_k, num_experts): {sorted(sizes)}"}
        [(top_k, num_experts)] = sizes
        return {"layers": list(layers), "top_k": top_k, "num_experts": num_experts}
