"""rollouts/step_N.jsonl: some responses of a step, to be read by a person."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpgd.files import write_text_atomic
from megatron_cpgd.types import RolloutGroup

type PerRollout = Sequence[Sequence[float]]
"""[P, G]: one number for each rollout of each group."""


def write_rollouts(
    path: Path,
    groups: Sequence[RolloutGroup],
    *,
    rewards: PerRollout,
    reward_parts: Mapping[str, PerRollout],
    advantages: PerRollout,
    limit: int,
    token_level: bool = False,
) -> None:
    """Write `limit` rollouts, spread evenly over the batch; nothing if `limit` is 0.

    Args:
        rewards: [P, G] weighted sums.
        reward_parts: reward function -> [P, G].
        advantages: [P, G].
        token_level: also write token ids and the engine's log-probabilities.
    """
    places = [(p, g) for p, group in enumerate(groups) for g in range(len(group.rollouts))]
    count = min(limit, len(places))
    rows = [
        _row(groups[p], g, token_level)
        | {
            "reward": float(rewards[p][g]),
            "rewards": {name: float(part[p][g]) for name, part in reward_parts.items()},
            "advantage": float(advantages[p][g]),
        }
        for p, g in (places[i * len(places) // count] for i in range(count))
    ]
    if rows:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_text_atomic(path, text)


def _row(group: RolloutGroup, index: int, token_level: bool) -> dict[str, Any]:
    prompt, rollout = group.prompt, group.rollouts[index]
    row: dict[str, Any] = {
        "prompt_id": prompt.id,
        "sample": index,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": rollout.text,
        "finish_reason": rollout.finish_reason,
        "prompt_tokens": len(prompt.token_ids),
        "response_tokens": len(rollout.token_ids),
        "weight_version": rollout.weight_version,
    }
    if token_level:
        row |= {"token_ids": rollout.token_ids, "rollout_logprobs": rollout.logprobs}
    return row
