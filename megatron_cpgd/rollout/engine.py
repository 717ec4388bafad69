"""What the training loop asks of a sampling engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.types import Rollout
from megatron_cpgd.weights.fingerprint import Fingerprints


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    n: int = 1
    """Responses per prompt; 1 if `temperature` is 0."""
    temperature: float = 1.0
    """0 decodes greedily."""
    top_p: float = 1.0
    """Nucleus; 1 is off."""
    top_k: int = -1
    """Most likely tokens to draw from; -1 is off."""
    max_tokens: int
    """A response is cut here."""
    stop_token_ids: list[int] = field(default_factory=list)
    """End tokens; there are no others, whatever the model's generation config says."""
    seed: int | None = None
    """Makes the call reproducible: response i of prompt p draws from stream seed + p * n + i."""
    return_routes: bool = False
    """Fill `Rollout.routes`, for a mixture of experts."""

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"n and max_tokens are at least 1 and temperature at least 0: {self}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"greedy decoding gives {self.n} equal responses; use n = 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefreshReport:
    """What the engine read during one weight refresh."""

    seconds: float
    """From the call to the answer."""
    tensors: int
    nbytes: int
    fingerprints: Fingerprints
    """Of the tensors that the engine read, as `weights/fingerprint.py` has them."""


class RolloutEngine(Protocol):
    """An engine holds one version of the weights and knows which.

    A new one holds version 0, or none if it was started without weights.
    """

    def generate(
        self,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seeds: list[int] | None = None,
        version: int,
    ) -> list[list[Rollout]]:
        """[P][n] responses, in the order of the prompts.

        The log-probabilities are those of the distribution that was sampled from, temperature,
        top-p and top-k included; greedy responses carry those of temperature 1.

        Args:
            prompts: [P][Lp] token ids.
            seeds: [P] one per prompt, in place of `sampling.seed`; response i uses seed + i.
            version: of the weights that must produce the responses.

        Raises:
            RolloutError: a prompt does not fit the model, the engine holds another version, it
                cannot return routes or they are wrong, or it died or did not answer in time.
            WeightSyncError: the last refresh failed, it was started without weights, or it sleeps.
        """
        ...

    def refresh(self, arena: Path, version: int) -> RefreshReport:
        """Load all tensors of a finished arena; afterwards the engine holds `version`.

        After a failure the engine generates nothing until a refresh succeeds.

        Args:
            arena: safetensors file with every tensor of the model's checkpoint, under its names.
            version: not below the version the engine holds.

        Raises:
            WeightSyncError: the arena does not fit the model, or loading broke off.
            RolloutError: the engine died or did not answer in time.
        """
        ...

    def sleep(self) -> None:
        """Give the GPU memory back, weights included; the next refresh takes it again.

        Until then the engine generates nothing. Asleep it stays asleep.

        Raises:
            RolloutError: the engine was not started for that, died or did not answer in time.
        """
        ...

    def close(self) -> None:
        """End the engine; safe to call twice."""
        ...


def stream_seeds(sampling: Sampling, prompts: int, seeds: list[int] | None) -> list[int] | None:
    """[P] seed of the first response to each prompt; None leaves the draw to the engine."""
    if seeds is not None:
        if len(seeds) != prompts:
            raise ValueError(f"{len(seeds)} seeds for {prompts} prompts")
        return seeds
    if sampling.seed is None:
        return None
    # Steps of n keep the streams apart: prompt p uses seeds [p * n, p * n + n).
    return [sampling.seed + p * sampling.n for p in range(prompts)]


def check_prompts(
    prompts: list[list[int]], *, max_tokens: int, vocab_size: int, max_model_len: int
) -> None:
    """Refuse what vLLM would crash on (an unknown id) or silently cut (a response without room).

    Raises:
        RolloutError: names the first prompt that does not fit.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise RolloutError(f"prompt {i} is empty; it needs at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            bad = next(token for token in prompt if not 0 <= token < vocab_size)
            raise RolloutError(
                f"prompt {i} contains token id {bad}, the model has ids 0 to {vocab_size - 1}; "
                "check that tokenizer and model belong together"
            )
        if len(prompt) + max_tokens > max_model_len:
            raise RolloutError(
                f"prompt {i} has {len(prompt)} tokens and may get {max_tokens} more, the engine "
                f"was started for {max_model_len}; shorten the prompt or raise max_model_len"
            )
