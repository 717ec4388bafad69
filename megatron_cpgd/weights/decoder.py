"""A model as the weight tables see it: sizes, and which tensors there are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of gated MLPs, in place of the one MLP of most layers."""

    count: int
    intermediate: int
    """Of each expert."""
    dense_layers: frozenset[int] = frozenset()
    """Layers that keep a single MLP."""
    hf_block: str = "mlp"
    """Name of the block inside a layer."""
    hf_projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's gate, up and down projection."""
    shared_intermediate: int = 0
    """Of the MLP that sees every token beside the experts; 0: there is none."""
    score_correction: bool = False
    """Sigmoid scores, and a bias that corrects them for the choice of experts only."""
    packed: bool = False
    """One HF tensor holds the projections of all experts; they and the router have biases."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention through low-rank projections of queries, and of keys and values together."""

    q_rank: int | None
    """None: queries have a single projection."""
    kv_rank: int
    qk_head_dim: int
    """Of the part of queries and keys without rotation."""
    rotary_dim: int
    v_head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """What decides names and shapes of a decoder."""

    vocab: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head."""
    sinks: bool = False
    """A learned logit of each head that takes part in the softmax of attention."""
    latent: LatentAttention | None = None
    """In place of heads with projections of their own."""
    experts: Experts | None = None
    prediction_layers: int = 0
    """Layers behind the last one that predict further tokens; not trained, not computed."""

    @property
    def moe_layers(self) -> list[int]:
        """Places of the layers with experts."""
        if self.experts is None:
            return []
        return [i for i in range(self.layers) if i not in self.experts.dense_layers]
