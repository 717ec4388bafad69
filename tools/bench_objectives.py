"""Time and memory of log-probs, entropy and objective against plain PyTorch, side by side.

One measurement is a forward and a backward pass, from hidden states [tokens, hidden] and the output
weight [vocab, hidden] to the gradients of both. The plain side is what one would write first: all
logits, log_softmax in fp32, gather, the published loss and autograd. Its entropy is computed
without gradient, which is the cheaper way. Every measurement has a process of its own; memory is
the peak above the inputs, and time on a CPU is processor time of all threads. Where the plain side
would not fit into memory it is extrapolated from the largest count that does, marked by "~".

    python tools/bench_objectives.py --tokens 1024 2048 4096 8192 --dtype fp32 bf16
"""

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.algorithm.loss_sequences import build_loss_sequences
from megatron_cpgd.algorithm.objective import Objective, Tokens, build_objective
from megatron_cpgd.algorithm.sequences import Sequences, one_rank_sequences
from megatron_cpgd.config.algorithm import AlgorithmConfig
from megatron_cpgd.config.presets import PRESETS
from megatron_cpgd.config.schema import BatchConfig
from megatron_cpgd.errors import USER_ERROR, UserError
from megatron_cpgd.policy.logprobs import LogprobSettings, linear_logprobs
from megatron_cpgd.types import TrainSequence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESPONSES_PER_PROMPT = 8
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem; it fixes all random numbers."""

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    objective: str
    device: str
    chunk_tokens: int
    response_tokens: int
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a process measured."""

    seconds: float
    """The fastest repetition; on the CPU processor time, because the machine may be busy."""
    peak_bytes: int
    """Above the inputs, in the first repetition."""
    loss: float
    grad_hidden_norm: float
    grad_weight_norm: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Inputs of both sides."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    responses: list[TrainSequence]
    tokens: Tokens
    """[1, tokens] each."""
    sequences: Sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTokens:
    """What a published loss reads, [tokens] each."""

    old_logprobs: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None
    """None for a method without a reference policy."""
    response: Tensor
    """Index of the token's response."""


Step = Callable[[Case, Batch], Tensor]
"""Loss of a batch, ready for `backward`."""


def algorithm(objective: str) -> AlgorithmConfig:
    """The preset of this name."""
    return AlgorithmConfig.model_validate(PRESETS[objective].settings)


# ---- inputs ----


def make_batch(case: Case) -> Batch:
    """Responses of equal length, of which only the last may be shorter.

    The old log-probs lie about 0.1 from the new ones. Logits of variance v have a log-sum-exp near
    ln(vocab) + v / 2, so this takes no pass over all logits.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.tokens, case.hidden, generator=generator)
    weight = torch.randn(case.vocab, case.hidden, generator=generator).div_(case.hidden**0.5)
    targets = torch.randint(case.vocab, (case.tokens,), generator=generator)
    log_sum = torch.tensor(case.vocab).log() + hidden.square().mean(-1) / 2
    old = (hidden * weight[targets]).sum(-1) - log_sum
    old += 0.1 * torch.randn(case.tokens, generator=generator)
    responses = [
        TrainSequence(
            group=i // RESPONSES_PER_PROMPT,
            prompt_ids=torch.zeros(1, dtype=torch.int64),
            response_ids=ids,
            rollout_logprobs=values,
            advantage=torch.randn((), generator=generator).item(),
            old_logprobs=values,
            ref_logprobs=values - 0.2,
            truncated=False,
        )
        for i, (ids, values) in enumerate(
            zip(targets.split(case.response_tokens), old.split(case.response_tokens), strict=True)
        )
    ]
    built = build_loss_sequences(responses, algorithm(case.objective))
    tokens = {name: torch.cat([s.tensors[name] for s in built]) for name in built[0].tensors}
    tokens["loss_mask"] = torch.ones(case.tokens, dtype=torch.bool)
    index = torch.arange(case.tokens, device=case.device) // case.response_tokens
    dtype = DTYPES[case.dtype]
    return Batch(
        hidden=hidden.to(case.device, dtype).requires_grad_(),
        weight=weight.to(case.device, dtype).requires_grad_(),
        targets=targets.to(case.device),
        responses=responses,
        tokens={name: x[None].to(case.device) for name, x in tokens.items()},
        sequences=one_rank_sequences(index[None]),
    )


# ---- the two sides ----


def our_loss(case: Case, batch: Batch) -> Tensor:
    """The package's own functions."""
    settings = LogprobSettings(
        vocab_size=case.vocab, temperature=1.0, chunk_tokens=case.chunk_tokens
    )
    logprobs, entropy = linear_logprobs(
        batch.hidden, batch.weight, batch.targets, settings, dist.group.WORLD
    )
    objective = build_objective(algorithm(case.objective))
    loss, _ = objective.evaluate(logprobs[None], entropy[None], batch.tokens, batch.sequences)
    return loss


def plain_loss(case: Case, batch: Batch) -> Tensor:
    """PyTorch without any of ours."""
    log_p = (batch.hidden @ batch.weight.T).float().log_softmax(-1)
    logprobs = log_p.gather(-1, batch.targets[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    assert len(entropy) == len(logprobs)
    return plain_objective(case.objective, logprobs, batch)


def plain_objective(name: str, logprobs: Tensor, batch: Batch) -> Tensor:
    """The published loss of a method, for autograd."""
    flat = {name: values[0] for name, values in batch.tokens.items()}
    tokens = PlainTokens(
        old_logprobs=flat["old_logprobs"],
        advantages=flat["advantages"],
        ref_logprobs=flat.get("ref_logprobs"),
        response=batch.sequences.index[0],
    )
    per_token = PLAIN_OBJECTIVES[name](logprobs, tokens, algorithm(name))
    return (flat["coefficients"] * per_token).sum()


def _plain_cpgd(logprobs: Tensor, tokens: PlainTokens, config: AlgorithmConfig) -> Tensor:
    """arXiv:2505.12504, Eq. 2."""
    log_ratio, advantages = logprobs - tokens.old_logprobs, tokens.advantages
    low, high = _bounds(config)
    clipped = log_ratio.exp().clamp(low, high).log()
    policy = torch.minimum(log_ratio * advantages, clipped * advantages)
    weight = (log_ratio.exp().detach() - 1).clamp(max=config.drift.gradient_clip)
    return -policy + config.drift.coef * weight * logprobs


def _plain_grpo(logprobs: Tensor, tokens: PlainTokens, config: AlgorithmConfig) -> Tensor:
    """arXiv:2402.03300, Eq. 3 and 4."""
    assert tokens.ref_logprobs is not None, "the preset has a reference policy"
    q = tokens.ref_logprobs - logprobs
    kl = q.exp() - q - 1
    policy = _ppo((logprobs - tokens.old_logprobs).exp(), tokens, config)
    return policy + config.reference.coef * kl


def _plain_gspo(logprobs: Tensor, tokens: PlainTokens, config: AlgorithmConfig) -> Tensor:
    """arXiv:2507.18071."""
    sums = _per_response(logprobs - tokens.old_logprobs, tokens.response)
    counts = tokens.response.bincount()
    return _ppo((sums / counts).exp()[tokens.response], tokens, config)


def _plain_vespo(logprobs: Tensor, tokens: PlainTokens, config: AlgorithmConfig) -> Tensor:
    """arXiv:2602.10693."""
    weight = _per_response(logprobs - tokens.old_logprobs, tokens.response).detach().exp()
    weight = weight[tokens.response]
    policy, above = config.policy, tokens.advantages >= 0
    power = torch.where(above, policy.positive_power, policy.negative_power)
    decay = torch.where(above, policy.positive_decay, policy.negative_decay)
    phi = weight**power * (decay * (1 - weight)).exp()
    return -phi * tokens.advantages * logprobs


PLAIN_OBJECTIVES = {
    "cpgd": _plain_cpgd,
    "grpo": _plain_grpo,
    "gspo": _plain_gspo,
    "vespo": _plain_vespo,
}


def _ppo(ratio: Tensor, tokens: PlainTokens, config: AlgorithmConfig) -> Tensor:
    clipped = ratio.clamp(*_bounds(config))
    return -torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


def _bounds(config: AlgorithmConfig) -> tuple[float, float]:
    return 1 - config.clip.low, 1 + config.clip.high


def _per_response(values: Tensor, response: Tensor) -> Tensor:
    sums = torch.zeros(int(response[-1]) + 1, device=values.device)
    return sums.index_add(0, response, values)


SIDES: dict[str, Step] = {"plain": plain_loss, "ours": our_loss}


# ---- measuring, in a process of its own ----


def measure_side(side: str, case: Case) -> Result:
    """Forward and backward of one side."""
    _one_rank(case.device)
    batch = make_batch(case)
    leaves = (batch.hidden, batch.weight)
    memory = _PeakMemory(case.device)
    peak, loss = 0, torch.zeros(())

    def step() -> None:
        nonlocal loss
        batch.hidden.grad = batch.weight.grad = None
        loss = SIDES[side](case, batch)
        loss.backward()

    seconds = []
    for repetition in range(case.repeat):
        seconds.append(_seconds(step, case.device))
        if repetition == 0:
            peak = memory.bytes()
    norms = [x.grad.norm(dtype=torch.float64).item() for x in leaves if x.grad is not None]
    return Result(
        seconds=min(seconds),
        peak_bytes=peak,
        loss=loss.item(),
        grad_hidden_norm=norms[0],
        grad_weight_norm=norms[1],
    )


def measure_objective(case: Case) -> tuple[float, float]:
    """Seconds of (`Objective.evaluate` with its backward pass, `build_loss_sequences`)."""
    batch = make_batch(case)
    config = algorithm(case.objective)
    objective: Objective = build_objective(config)
    logprobs = (batch.tokens["old_logprobs"] + 0.1).requires_grad_()
    entropy = torch.ones_like(logprobs, requires_grad=False)

    def evaluate() -> None:
        logprobs.grad = None
        loss, _ = objective.evaluate(logprobs, entropy, batch.tokens, batch.sequences)
        loss.backward()

    def build() -> None:
        build_loss_sequences(batch.responses, config)

    repeat = max(case.repeat, 5)  # milliseconds each
    return (
        min(_seconds(evaluate, case.device) for _ in range(repeat)),
        min(_seconds(build, case.device) for _ in range(repeat)),
    )


def _one_rank(device: str) -> None:
    """The TP group of a single rank: its collectives stay in this process."""
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _seconds(function: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class _PeakMemory:
    """Peak since this object was made: allocated on the GPU, or resident on the CPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
            self._start = _process_status("VmRSS")

    def bytes(self) -> int:
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated() - self._start
        return _process_status("VmHWM") - self._start


def _process_status(key: str) -> int:
    return _proc_bytes(Path("/proc/self/status"), key)


def _proc_bytes(file: Path, key: str) -> int:
    [line] = [line for line in file.read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


def free_memory(device: str) -> int:
    """Bytes that a new process can have."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return _proc_bytes(Path("/proc/meminfo"), "MemAvailable")


def in_own_process(function: Callable, *arguments: object):
    """The function's result, from a fork of a process that has imported the package, and no more.

    Raises:
        UserError: the process was killed.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload([linear_logprobs.__module__])
    with ProcessPoolExecutor(1, mp_context=fork) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{function.__name__}{arguments} was killed, probably for lack of memory; use "
                "fewer --tokens"
            ) from error


# ---- the study ----


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Both sides on one problem."""

    tokens: int
    hidden: int
    dtype: str
    plain: Result
    plain_extrapolated: bool
    ours: Result

    @property
    def time_ratio(self) -> float:
        """Ours over plain."""
        return self.ours.seconds / self.plain.seconds

    @property
    def memory_ratio(self) -> float:
        """Ours over plain."""
        return self.ours.peak_bytes / self.plain.peak_bytes


def compare(cases: list[Case]) -> list[Row]:
    """Both sides at growing numbers of tokens."""
    rows: list[Row] = []
    for case in sorted(cases, key=lambda case: case.tokens):
        measured = [row for row in rows if not row.plain_extrapolated]
        needed, free = _plain_bytes(case, measured), free_memory(case.device)
        if needed > free and not measured:
            raise UserError(
                f"plain PyTorch on {case.tokens} tokens needs about {needed / GIB:.2g} GiB and "
                f"{free / GIB:.2g} GiB are free; add a smaller count to --tokens, from which it is "
                "extrapolated"
            )
        fits = needed <= free
        ours = _measure("ours", case)
        plain = _measure("plain", case) if fits else _extrapolate(measured[-1], case)
        rows.append(
            Row(
                tokens=case.tokens,
                hidden=case.hidden,
                dtype=case.dtype,
                plain=plain,
                plain_extrapolated=not fits,
                ours=ours,
            )
        )
    return rows


def _measure(side: str, case: Case) -> Result:
    result: Result = in_own_process(measure_side, side, case)
    _progress(
        f"{case.dtype}, hidden {case.hidden}, {case.tokens} tokens, {side}: "
        f"{result.seconds:.2f} s, {result.peak_bytes / GIB:.2f} GiB"
    )
    return result


def _plain_bytes(case: Case, measured: list[Row]) -> float:
    """Expected peak of the plain side, inputs included, with a tenth to spare."""
    inputs = DTYPES[case.dtype].itemsize * case.hidden * (case.vocab + case.tokens)
    # Log-probs, and at once either two more for the entropy or two for the gradient.
    peak = 3 * 4 * case.tokens * case.vocab + 2 * inputs
    if measured:
        peak = measured[-1].plain.peak_bytes * case.tokens / measured[-1].tokens
    return 1.1 * (peak + 2 * inputs)


def _extrapolate(row: Row, case: Case) -> Result:
    """In proportion to the tokens: the plain peak is its [tokens, vocab] tensors alone."""
    growth = case.tokens / row.tokens
    return Result(
        seconds=row.plain.seconds * growth,
        peak_bytes=int(row.plain.peak_bytes * growth),
        loss=float("nan"),
        grad_hidden_norm=float("nan"),
        grad_weight_norm=float("nan"),
    )


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def largest_difference(row: Row) -> float:
    """Relative, of loss and gradient norms; nan where the plain side did not run."""
    names = ("loss", "grad_hidden_norm", "grad_weight_norm")
    pairs = [(getattr(row.ours, name), getattr(row.plain, name)) for name in names]
    return max(abs(ours - plain) / abs(plain) for ours, plain in pairs)


def print_rows(rows: list[Row]) -> None:
    """The comparison, one table per dtype and hidden size."""
    for (dtype, hidden), group in itertools.groupby(rows, key=lambda row: (row.dtype, row.hidden)):
        print(f"\n{dtype}, hidden {hidden}: plain PyTorch | ours | ours / plain")
        print(
            f"{'tokens':>7}  {'seconds':>9} {'GiB':>7} | {'seconds':>8} {'GiB':>6} {'us/token':>8} "
            f"| {'time':>5} {'memory':>6}  difference"
        )
        for row in group:
            mark = "~" if row.plain_extrapolated else " "
            print(
                f"{row.tokens:7d}  {mark}{row.plain.seconds:8.3f} "
                f"{mark}{row.plain.peak_bytes / GIB:6.2f} "
                f"| {row.ours.seconds:8.3f} {row.ours.peak_bytes / GIB:6.2f} "
                f"{1e6 * row.ours.seconds / row.tokens:8.0f} "
                f"| {row.time_ratio:5.2f} {row.memory_ratio:6.2f}  {largest_difference(row):.0e}"
            )
    if any(row.plain_extrapolated for row in rows):
        print("~ extrapolated: plain PyTorch does not fit into memory there")


def print_objectives(seconds: dict[tuple[str, int], tuple[float, float]], step_s: float) -> None:
    """Objectives by themselves."""
    print("\nobjectives: evaluate with backward | build_loss_sequences")
    print(f"{'':8} {'tokens':>7}  {'ns/token':>8} | {'ns/token':>8}")
    for (name, tokens), (evaluate, build) in seconds.items():
        print(f"{name:8} {tokens:7d}  {1e9 * evaluate / tokens:8.0f} | {1e9 * build / tokens:8.0f}")
    most = max(tokens for _, tokens in seconds)
    worst = max(evaluate for (_, tokens), (evaluate, _) in seconds.items() if tokens == most)
    print(f"slowest evaluate / log-probs, entropy and gradients: {worst / step_s:.3%}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 if the problem does not fit this machine."""
    arguments = _parse(argv)
    shared = {
        "vocab": arguments.vocab,
        "device": arguments.device,
        "chunk_tokens": arguments.chunk_tokens,
        "response_tokens": arguments.response_tokens,
        "repeat": arguments.repeat,
    }
    try:
        rows = []
        for dtype, hidden in itertools.product(arguments.dtype, arguments.hidden):
            problem = {"dtype": dtype, "hidden": hidden, "objective": arguments.objectives[0]}
            rows += compare([Case(tokens=n, **problem, **shared) for n in arguments.tokens])
        seconds = {}
        for name, n in itertools.product(arguments.objectives, sorted(arguments.tokens)):
            case = Case(tokens=n, hidden=1, dtype="fp32", objective=name, **shared)
            seconds[name, n] = in_own_process(measure_objective, case)
            _progress(f"{name} alone, {n} tokens: {1e3 * seconds[name, n][0]:.2f} ms")
    except UserError as error:
        sys.stderr.write(f"bench_objectives: {error}\n")
        return USER_ERROR
    if arguments.json:
        objectives = [
            {"objective": name, "tokens": n, "evaluate_s": evaluate, "build_s": build}
            for (name, n), (evaluate, build) in seconds.items()
        ]
        print(json.dumps({"rows": [asdict(row) for row in rows], "objectives": objectives}))
        return 0
    print_rows(rows)
    most = max(arguments.tokens)
    print_objectives(seconds, min(row.ours.seconds for row in rows if row.tokens == most))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n    python")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cuda = torch.cuda.is_available()
    several = {"nargs": "+", "metavar": "N", "type": _positive}
    parser.add_argument("--tokens", default=[1024, 2048, 4096, 8192], **several)
    parser.add_argument("--vocab", default=151936, metavar="N", type=_positive)
    parser.add_argument(
        "--hidden",
        default=[256],
        help="a small one shows what is not matrix product; 2048 is that of a 2B model",
        **several,
    )
    parser.add_argument("--dtype", default=list(DTYPES), nargs="+", choices=DTYPES)
    parser.add_argument(
        "--objectives",
        default=list(PLAIN_OBJECTIVES),
        nargs="+",
        choices=PLAIN_OBJECTIVES,
        help="the first is part of the comparison, each is measured by itself",
    )
    parser.add_argument(
        "--chunk-tokens",
        default=BatchConfig().logprob_chunk_tokens,
        metavar="N",
        type=_positive,
        help="batch.logprob_chunk_tokens; default: that of a run",
    )
    parser.add_argument("--response-tokens", default=256, metavar="N", type=_positive)
    parser.add_argument("--repeat", default=2, metavar="N", type=_positive, help="best of N")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="all numbers instead of tables")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not cuda:
        parser.error("--device cuda: torch sees no GPU; use --device cpu")
    return arguments


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
