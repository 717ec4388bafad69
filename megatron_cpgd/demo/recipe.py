"""Everything that decides what the demo trains from."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmupSettings:
    """Length and pace of the supervised training."""

    steps: int = 1000
    """Adam steps. After 600 the model is still unsure of the sums themselves, after 1000 only of
    which procedure to follow."""
    batch_size: int = 64
    """Worked examples per step."""
    lr: float = 6e-3
    """Peak learning rate: up linearly over `rise_steps`, then down linearly to 0."""
    rise_steps: int = 50
    """Steps until the peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Sizes and rates of the problems, the worked examples and the warm-up."""

    seed: int = 0
    train: int = 4096
    """Problems for the warm-up and for reinforcement learning."""
    heldout: int = 256
    """Problems that neither of them ever shows."""
    hard_share: float = 0.75
    """Share of problems with a carry or a borrow. The habit makes no mistake in the others, so
    1 - hard_share is about the greedy accuracy after the warm-up."""
    habit_rate: float = 0.75
    """How often the tutor follows the bad habit: above one half, or greedy decoding is right at
    once; below one, or there is nothing for reinforcement learning to select."""
    slip_rate: float = 0.1
    """How often a digit slips."""
    examples_per_problem: int = 4
    """Worked examples of each training problem, each with its own mistakes."""
    max_length: int = 128
    """Longest sequence of the model, in tokens."""
    experts: int = 0
    """Experts of each layer, two of which see a token; 0: the layers are dense."""
    warmup: WarmupSettings = field(default_factory=WarmupSettings)


DENSE = Recipe()
"""What `make demo` trains from."""
MOE = Recipe(experts=8)
"""What `make demo-moe` trains from: the same problems and warm-up, a mixture of experts."""
