"""The section `router`: load balancing of a mixture of experts."""

from pydantic import Field

from megatron_cpgd.config.base import Config


class RouterConfig(Config):
    """Load balancing of a mixture of experts while it is trained, off by default, whatever
    config.json says; equations in docs/architecture.md. The live routers count, also where routes
    are replayed."""

    aux_loss_coef: float = Field(0.0, ge=0)
    """Coefficient of the sequence-wise auxiliary loss (DeepSeek-V3, arXiv:2412.19437, Eq. 17); the
    loss of a balanced layer is 1."""
    z_loss_coef: float = Field(0.0, ge=0)
    """Coefficient of the squared log-sum-exp of a router's logits (ST-MoE, arXiv:2202.08906)."""
    bias_update_rate: float = Field(0.0, ge=0)
    """After each optimizer step the selection bias of an expert moves by this towards a balanced
    load (arXiv:2408.15664); needs a model with such a bias (e_score_correction_bias). 0 leaves it
    as it is."""
