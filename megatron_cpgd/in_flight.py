"""Responses that are sampled in pieces: one that is not finished goes on with later weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from megatron_cpgd.rollout.engine import RolloutEngine, Sampling
from megatron_cpgd.types import Rollout, Routes

FILE = "in_flight.msgpack"
"""Inside a checkpoint: the groups that have begun, if any."""
SEED_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of a response's pieces: odd and large, so that no two responses share one."""


class OpenGroup(msgspec.Struct, kw_only=True):
    """The responses to one prompt, finished or not."""

    prompt: int
    """Its place in the training data."""
    seed: int
    """Of the first response's first piece; response i has seed + i."""
    rollouts: list[Rollout | None]
    """[G] what there is of each; None before its first piece."""


class InFlight:
    """Groups that have begun, in this order. Every call gives each unfinished response a piece."""

    def __init__(self, *, piece_tokens: int, max_tokens: int) -> None:
        """
        Args:
            piece_tokens: longest piece; divides `max_tokens`.
            max_tokens: a response is cut here.
        """
        assert max_tokens % piece_tokens == 0, f"{max_tokens=} {piece_tokens=}"
        self._piece_tokens = piece_tokens
        self._max_tokens = max_tokens
        self.groups: list[OpenGroup] = []

    def begin(self, prompts: Sequence[int], *, seed: int, size: int) -> None:
        """Add a group of `size` responses for each prompt; response i of prompt p has the seed
        `seed + p * size + i`."""
        self.groups += [
            OpenGroup(prompt=prompt, seed=seed + p * size, rollouts=[None] * size)
            for p, prompt in enumerate(prompts)
        ]

    def advance(
        self,
        engine: RolloutEngine,
        prompt_ids: Callable[[int], list[int]],
        sampling: Sampling,
        *,
        version: int,
    ) -> None:
        """Sample one more piece of every unfinished response.

        Args:
            prompt_ids: token ids of the prompt at a place in the training data.
            sampling: its n, max_tokens and seed are ours.
        """
        unfinished = [
            (group, i)
            for group in self.groups
            for i, rollout in enumerate(group.rollouts)
            if not self._is_finished(rollout)
        ]
        known = [group.rollouts[i] for group, i in unfinished]
        pieces = engine.generate(
            [
                prompt_ids(group.prompt) + (rollout.token_ids if rollout else [])
                for (group, _), rollout in zip(unfinished, known, strict=True)
            ],
            replace(sampling, n=1, max_tokens=self._piece_tokens, seed=None),
            seeds=[
                self._seed(group.seed + i, rollout)
                for (group, i), rollout in zip(unfinished, known, strict=True)
            ],
            version=version,
        )
        for (group, i), rollout, [piece] in zip(unfinished, known, pieces, strict=True):
            group.rollouts[i] = join(rollout, piece) if rollout else piece

    def copy_groups(self) -> list[OpenGroup]:
        """The groups as they are now; what is sampled later does not change them."""
        return [
            msgspec.structs.replace(group, rollouts=list(group.rollouts)) for group in self.groups
        ]

    def files(self) -> dict[str, bytes]:
        """What a checkpoint has to hold for `load`, by file name."""
        return {FILE: msgspec.msgpack.encode(self.groups)} if self.groups else {}

    def load(self, checkpoint: Path) -> None:
        """Go on with the groups that the checkpoint holds."""
        file = checkpoint / FILE
        if file.is_file():
            self.groups = msgspec.msgpack.decode(file.read_bytes(), type=list[OpenGroup])

    def take(self, count: int) -> list[OpenGroup] | None:
        """The first `count` groups whose responses are all finished; None if there are fewer."""
        finished = [group for group in self.groups if all(map(self._is_finished, group.rollouts))]
        if len(finished) < count:
            return None
        taken = finished[:count]
        gone = set(map(id, taken))
        self.groups = [group for group in self.groups if id(group) not in gone]
        return taken

    def _is_finished(self, rollout: Rollout | None) -> bool:
        return rollout is not None and (
            rollout.finish_reason == "stop" or len(rollout.token_ids) >= self._max_tokens
        )

    def _seed(self, seed: int, rollout: Rollout | None) -> int:
        pieces = len(rollout.token_ids) // self._piece_tokens if rollout else 0
        return (seed + pieces * SEED_STRIDE) % 2**63


def age_metrics(rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """How much of a batch is older than `version`, the weights of its last pieces."""
    pieces = [piece for rollout in rollouts for piece in rollout.versions]
    older = sum(tokens for sampled_by, tokens in pieces if sampled_by < version)
    return {
        "rollout/older_tokens_frac": older / max(sum(tokens for _, tokens in pieces), 1),
        "rollout/older_steps_max": version - min(sampled_by for sampled_by, _ in pieces),
    }


def join(rollout: Rollout, piece: Rollout) -> Rollout:
    """A response and what continues it. Each token keeps the log-prob of the weights that sampled
    it, and the routes with which these computed its input."""
    routes = None
    if rollout.routes is not None:
        assert piece.routes is not None, "the piece before has routes"
        known = rollout.routes.experts
        # The piece's rows begin with the prompt and all that was known, computed by later weights.
        routes = Routes(
            layout=rollout.routes.layout, experts=known + piece.routes.experts[len(known) :]
        )
    return replace(
        piece,
        token_ids=rollout.token_ids + piece.token_ids,
        logprobs=rollout.logprobs + piece.logprobs,
        routes=routes,
        pieces=_joined(rollout.versions, piece.versions),
    )


def _joined(first: list[tuple[int, int]], then: list[tuple[int, int]]) -> list[tuple[int, int]]:
    (version, tokens), (next_version, more) = first[-1], then[0]
    if version == next_version:
        return [*first[:-1], (version, tokens + more), *then[1:]]
    return first + then
