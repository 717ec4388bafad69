"""Named methods: settings of `algorithm` that lie below the user's own.

A preset states what differs from CPGD, the schema's defaults. docs/objectives.md has the equations
and how certain each one is. A KL inside the reward is left out everywhere.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

PresetName = Literal[
    "cpgd", "cpg", "pgd", "pg", "cpgd_authors", "cpgd_tis",
    "ppo_clip", "ppo_clip_drift", "dual_clip",
    "grpo", "grpo_no_clip", "dr_grpo", "dapo",
    "reinforce_pp", "reinforce_pp_baseline", "rloo", "gpg",
    "gspo", "sampo", "cispo", "gmpo", "sapo", "minirl", "vespo", "minpro", "dppo_tv", "bapo",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """One method."""

    source: str
    """Where the equation and the numbers come from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What differs from the defaults of `AlgorithmConfig`."""


_NO_CLIP = {"type": "none"}
_NO_DRIFT = {"coef": 0.0}
_EQUAL = {"type": "equal"}
_RATIO = {"type": "ratio"}
_RESPONSE_MEAN = {"type": "sequence_mean_token_mean"}
_TOKEN_MEAN = {"type": "token_mean"}


def _clip(low: float, high: float) -> dict[str, Any]:
    return {"type": "constant", "low": low, "high": high}


PRESETS: dict[PresetName, Preset] = {
    "cpgd": Preset(source="arXiv:2505.12504, Eq. 2; numbers: MM-EUREKA"),
    "cpg": Preset(source="arXiv:2505.12504, ablation", settings={"drift": _NO_DRIFT}),
    "pgd": Preset(source="arXiv:2505.12504, ablation", settings={"clip": _NO_CLIP}),
    "pg": Preset(
        source="arXiv:2505.12504, ablation", settings={"clip": _NO_CLIP, "drift": _NO_DRIFT}
    ),
    "cpgd_authors": Preset(
        source="MM-EUREKA, September 2025: its loss with micro-batches of one response",
        settings={"aggregation": _RESPONSE_MEAN, "mini_batches": 8},
    ),
    "cpgd_tis": Preset(
        source="CPGD with token weights against the sampler; docs/objectives.md",
        settings={
            "correction": {"type": "truncate", "level": "token", "high": 2.0},
            "rejection": {"veto": 1e-4},
        },
    ),
    # Only the policy term differs from CPGD: its advantages, weights and aggregation.
    "ppo_clip": Preset(source="arXiv:1707.06347", settings={"policy": _RATIO, "drift": _NO_DRIFT}),
    "ppo_clip_drift": Preset(source="arXiv:2505.12504, Figure 1", settings={"policy": _RATIO}),
    "dual_clip": Preset(
        source="arXiv:1912.09729",
        settings={"policy": {"type": "ratio", "dual_clip": 3.0}, "drift": _NO_DRIFT},
    ),
    "grpo": Preset(
        source="arXiv:2402.03300 (DeepSeekMath), section 4.2",
        settings={
            "policy": _RATIO,
            "drift": _NO_DRIFT,
            "reference": {"coef": 0.04, "estimator": "k3"},
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "grpo_no_clip": Preset(
        source="arXiv:2505.12504, Figure 1",
        settings={
            "policy": _RATIO,
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "dr_grpo": Preset(
        source="arXiv:2503.20783",
        settings={
            "policy": _RATIO,
            "drift": _NO_DRIFT,
            "prompt_weight": _EQUAL,
            "aggregation": {"type": "sequence_sum_over_length"},
        },
    ),
    "dapo": Preset(
        # Overlong shaping depends on the length of responses: advantage.overlong_buffer_tokens.
        source="arXiv:2503.14476, without overlong shaping; limit of batches: its recipe in verl",
        settings={
            "policy": _RATIO,
            "filter": {"max_batches": 10},
            "clip": _clip(0.2, 0.28),
            "drift": _NO_DRIFT,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "reinforce_pp": Preset(
        source="arXiv:2501.03262, no KL in the reward",
        settings={
            "policy": _RATIO,
            "drift": _NO_DRIFT,
            "advantage": {"baseline": "none", "whiten": True},
            "prompt_weight": _EQUAL,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "reinforce_pp_baseline": Preset(
        source="arXiv:2501.03262; coefficient of its KL (k2, in the loss) not established, so none",
        settings={
            "policy": _RATIO,
            "drift": _NO_DRIFT,
            "advantage": {"whiten": True},
            "prompt_weight": _EQUAL,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "rloo": Preset(
        source="arXiv:2402.14740: REINFORCE on whole responses",
        settings={
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "advantage": {"baseline": "leave_one_out"},
            "prompt_weight": _EQUAL,
            "aggregation": {"type": "sequence_mean_token_sum"},
        },
    ),
    "gpg": Preset(
        source="arXiv:2504.02546, F_norm = 1",
        settings={
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            # B / (B - M): the share is at most the number of prompts, so nothing is cut.
            "prompt_weight": {"type": "clip_filter", "max_weight": 1e6},
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "gspo": Preset(
        source="arXiv:2507.18071",
        settings={
            "policy": {"type": "sequence_ratio"},
            "clip": _clip(3e-4, 4e-4),
            "drift": _NO_DRIFT,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "sampo": Preset(
        source="arXiv:2602.21534, the authors' code, on episodes of one step",
        settings={
            "policy": {"type": "sequence_ratio"},
            # Published as 0.01, beside an advantage that is twice ours: two equal groups add up.
            "reference": {"coef": 5e-3},
            "filter": {"max_batches": 3},
            "clip": _clip(3e-3, 4e-3),
            "drift": _NO_DRIFT,
            "prompt_weight": _EQUAL,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "cispo": Preset(
        source="arXiv:2506.13585; the cap is from arXiv:2510.13786",
        settings={
            "policy": {"type": "capped_weight"},
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "gmpo": Preset(
        source="arXiv:2507.20673",
        settings={
            "policy": {"type": "geometric_mean"},
            "clip": _clip(0.32967995396436073, 0.49182469764127035),  # e^-0.4, e^0.4
            "drift": _NO_DRIFT,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "sapo": Preset(
        source="arXiv:2511.20347",
        settings={
            "policy": {"type": "soft_gate"},
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
    "minirl": Preset(
        source="arXiv:2512.01374",
        settings={
            "policy": {"type": "joint_weight"},
            "clip": _clip(0.2, 0.27),
            "drift": _NO_DRIFT,
            "prompt_weight": _EQUAL,
            "aggregation": {"type": "sequence_mean_token_sum"},
        },
    ),
    "vespo": Preset(
        source="arXiv:2602.10693, the authors' code",
        settings={
            "policy": {"type": "sequence_weight"},
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "minpro": Preset(
        source="arXiv:2601.22718; epsilons and aggregation not established",
        settings={
            "policy": {"type": "prefix_min"},
            "clip": _clip(0.2, 0.28),
            "drift": _NO_DRIFT,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "dppo_tv": Preset(
        source="arXiv:2602.04879",
        settings={
            "policy": {"type": "probability_mask"},
            "clip": _NO_CLIP,
            "drift": _NO_DRIFT,
            "aggregation": _TOKEN_MEAN,
        },
    ),
    "bapo": Preset(
        source="arXiv:2510.18927, Algorithm 1 and section 5.1, on GRPO",
        settings={
            "policy": _RATIO,
            "clip": {"type": "balanced"},
            "drift": _NO_DRIFT,
            "aggregation": _RESPONSE_MEAN,
        },
    ),
}


def preset_settings(name: Any) -> dict[str, Any]:
    """The settings of a preset; none for a name that does not exist, which the schema refuses."""
    return next((preset.settings for known, preset in PRESETS.items() if known == name), {})
