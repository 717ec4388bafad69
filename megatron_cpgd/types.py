"""Records that cross package borders. Every one is a leaf: it imports nothing of this package."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question as the engine receives it."""

    id: str
    """Stable name of the data row, `<file stem>:<row>`."""
    token_ids: list[int]
    """Chat template applied, generation prompt included."""
    text: str
    """The rendered prompt that `token_ids` encode."""
    answer: str | None
    """Ground truth for the reward functions, if the data has one."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Every other column of the data row, for user-defined rewards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteLayout:
    """What the columns of `Routes` stand for; the same for every rollout of a model."""

    layers: list[int]
    """[layers] places of the MoE layers among all layers of the model, ascending from 0."""
    top_k: int
    """Experts of a token in each of them."""
    num_experts: int

    @property
    def dtype(self) -> torch.dtype:
        """Of an expert's number: uint8 up to 256 experts, else uint16."""
        return torch.uint8 if self.num_experts <= 256 else torch.uint16

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * self.top_k * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """The experts to which the engine sent the tokens of one prompt and its response.

    Row t belongs to input token t, the prompt first. The last sampled token never was an input:
    it has no row, so there are R = prompt + response - 1 of them.
    """

    layout: RouteLayout
    experts: bytes = field(repr=False)
    """[R, layers, top_k] in C order, see `tensor`."""

    def __post_init__(self) -> None:
        per_token = self.layout.bytes_per_token
        assert len(self.experts) % per_token == 0, f"{len(self.experts)=} {per_token=}"

    def tensor(self) -> Tensor:
        """[R, layers, top_k] of `layout.dtype`; the experts of a token and layer, in no order."""
        flat = torch.frombuffer(bytearray(self.experts), dtype=self.layout.dtype)
        return flat.view(-1, len(self.layout.layers), self.layout.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response."""

    token_ids: list[int]
    """[T] sampled tokens, the end-of-sequence token included when it was sampled."""
    logprobs: list[float]
    """[T] log-probability of each sampled token under the sampling distribution of the engine."""
    finish_reason: FinishReason
    """`stop`: an end token was sampled; `length`: cut at the token limit."""
    weight_version: int
    """Version of the weights that produced it, or its last piece."""
    pieces: list[tuple[int, int]] = field(default_factory=list)
    """(weight version, tokens) of its pieces, if it was sampled in several; else empty."""
    text: str = ""
    """Decoded response without special tokens; filled by the trainer."""
    routes: Routes | None = None
    """Only if `Sampling.return_routes` asked for them."""

    @property
    def versions(self) -> list[tuple[int, int]]:
        """(weight version, tokens) of all its pieces, in order."""
        return self.pieces or [(self.weight_version, len(self.token_ids))]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """All responses to one prompt."""

    prompt: Prompt
    rollouts: list[Rollout]


@dataclass(slots=True, kw_only=True)
class TrainSequence:
    """One rollout as the trainer sees it. `T` counts response tokens; prompts carry no loss."""

    group: int
    """Index of the prompt in the rollout batch."""
    prompt_ids: Tensor
    """[Lp] int64."""
    response_ids: Tensor
    """[T] int64; T may be 0."""
    rollout_logprobs: Tensor
    """[T] float32, as the engine reported them."""
    advantage: float
    """A_omega: centred in the group and weighted."""
    truncated: bool
    """Whether the response was cut at the token limit."""
    old_logprobs: Tensor | None = None
    """[T] float32, log pi_old under Megatron; set by the old-log-prob pass."""
    ref_logprobs: Tensor | None = None
    """[T] float32, log-probs of the reference policy; None without one."""
    epoch_weight: Tensor | None = None
    """[T] float32, truncated importance weight of epochs after the first; None means 1."""
    rollout_routes: Tensor | None = None
    """[L, MoE layers, top_k] int16, the experts to which the engine sent input token t; -1 where it
    reported none, as for the last token. None: it was not asked."""
    routes: Tensor | None = None
    """The same of the experts to which token t goes when the trainer computes; -1 where its own
    routers choose. None: everywhere. Set by the old-log-prob pass."""

    def __post_init__(self) -> None:
        assert self.prompt_ids.dtype == self.response_ids.dtype == torch.int64
        assert len(self.prompt_ids) > 0, "a sequence needs at least one prompt token"
        assert len(self.rollout_logprobs) == len(self.response_ids), (
            f"{len(self.rollout_logprobs)=} {len(self.response_ids)=}"
        )
        _check_routes(self.rollout_routes, self.length)
        _check_routes(self.routes, self.length)

    @property
    def length(self) -> int:
        """Prompt and response tokens."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(slots=True, kw_only=True)
class LossSequence:
    """A sequence with everything its loss needs, fixed on the global batch before any split."""

    input_ids: Tensor
    """[L] int64, prompt then response."""
    prompt_length: int
    tensors: dict[str, Tensor]
    """[T] float32 each, by name: what the loss function reads per response token."""
    routes: Tensor | None = None
    """As `TrainSequence.routes`."""

    def __post_init__(self) -> None:
        _check_routes(self.routes, self.length)

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def response_length(self) -> int:
        return len(self.input_ids) - self.prompt_length


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """One forward pass of one data-parallel rank, before context-parallel slicing.

    Position t holds input token t and predicts `targets[t]`, the next token of the same sequence.
    """

    input_ids: Tensor
    """[B, S] int64; packed (THD) batches have B = 1."""
    targets: Tensor
    """[B, S] int64; 0 where `loss_mask` is False."""
    loss_mask: Tensor
    """[B, S] bool, True where the target is a response token."""
    position_ids: Tensor
    """[B, S] int64, restarting at 0 with each sequence."""
    tensors: dict[str, Tensor]
    """[B, S] float32 each, 0 where `loss_mask` is False."""
    indices: list[int]
    """Position of each contained sequence in the batch that was packed; -1 for filling."""
    lengths: list[int]
    """Real tokens of each contained sequence."""
    cu_seqlens: list[int] | None
    """[n + 1] padded boundaries of packed sequences; None for a padded (BSHD) batch."""

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        for name, x in {"targets": self.targets, "loss_mask": self.loss_mask,
                        "position_ids": self.position_ids, **self.tensors}.items():  # fmt: skip
            assert x.shape == shape, f"{name}: {tuple(x.shape)} is not {tuple(shape)}"
        if self.cu_seqlens is not None:
            assert shape[0] == 1 and self.cu_seqlens[-1] == shape[1], f"{shape=} {self.cu_seqlens=}"


def _check_routes(routes: Tensor | None, length: int) -> None:
    if routes is not None:
        assert routes.dtype == torch.int16 and routes.dim() == 3, f"{routes.dtype=} {routes.shape=}"
        assert len(routes) == length, f"{len(routes)=} {length=}"
