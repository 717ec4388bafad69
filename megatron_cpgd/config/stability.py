"""The section `stability`: what counts as a collapse, and what then happens."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_cpgd.config.base import Config


class StabilityConfig(Config):
    """What counts as a collapse, and what then happens; docs/stability.md has the causes."""

    action: Literal["off", "warn", "stop", "roll_back"] = "warn"
    """On a finding: nothing; a warning; end the run; or go on from the last good checkpoint."""
    window: int = Field(10, ge=2)
    """Earlier steps that a step is compared with, by their median; half of them are needed."""
    patience: int = Field(5, ge=1)
    """Steps in a row for which the condition of a cause must hold."""
    max_roll_backs: int = Field(2, ge=1)
    """With `roll_back`: so many in the whole run; then the run ends."""
    lr_factor: float = Field(0.5, gt=0, le=1)
    """With `roll_back`: each one multiplies the learning rate by this, for the rest of the run."""
    reward_drop: float | None = Field(0.5, gt=0)
    """reward/mean is lower than at its best by this share of it; null is off, as for all below."""
    length_collapse: float | None = Field(0.7, gt=0, lt=1)
    """rollout/response_tokens_mean is lower than at its highest by this share, without a gain."""
    length_explosion: float | None = Field(0.3, gt=0, lt=1)
    """rollout/truncated_frac is this much higher than at its lowest, without a gain."""
    entropy_collapse: float | None = Field(0.8, gt=0, lt=1)
    """policy/entropy is lower than at its highest by this share of it, without a gain."""
    entropy_explosion: float | None = Field(1.0, gt=0)
    """policy/entropy is this many nats higher than at its lowest, without a gain."""
    ratio_explosion: float | None = Field(10.0, gt=1)
    """policy/ratio_p999 exceeds this."""
    gradient_explosion: float | None = Field(10.0, gt=0)
    """policy/grad_norm_z exceeds this."""
    drift_explosion: float | None = Field(0.1, gt=0)
    """policy/kl_k3 exceeds this."""
    mismatch: float | None = Field(0.1, gt=0)
    """rollout/kl_k3, between engine and trainer, exceeds this."""
    repetition: float | None = Field(0.3, gt=0, lt=1)
    """rollout/repetition_frac is this much higher than at its lowest."""
    no_signal: float | None = Field(0.99, gt=0, lt=1)
    """reward/zero_variance_frac exceeds this. It only warns: a solved data set looks the same."""
    not_finite: int = Field(3, ge=1)
    """So many optimizer steps in a row, up to the end of a step, had a loss or gradient that is not
    finite. It ends the run whatever `action`, unless that rolls back."""

    @model_validator(mode="after")
    def _check_patience(self) -> "StabilityConfig":
        if self.gradient_explosion is not None and 2 * self.patience > self.window:
            raise ValueError(
                f"patience={self.patience} must be <= half of window={self.window}: after more "
                "steps the window takes exploded gradients for normal"
            )
        return self
