"""The demo's model with its tokenizer: built, warmed up, graded and saved."""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from megatron_cpgd.demo.arithmetic import Problem, Problems, tutor_response
from megatron_cpgd.demo.recipe import Recipe
from megatron_cpgd.demo.tokenizer import build_tokenizer
from megatron_cpgd.demo.warmup import build_model, respond, warm_up
from megatron_cpgd.rewards.exact_match import exact_match

logger = logging.getLogger(__name__)


def save_trained_model(
    folder: Path, problems: Problems, recipe: Recipe, rng: random.Random
) -> None:
    """Write a Hugging Face folder whose model has learnt from the tutor, mistakes included."""
    transformers_logging.disable_progress_bar()
    tokenizer = build_tokenizer(recipe.max_length)
    examples = [
        (problem.prompt, _example(problem, recipe, rng))
        for problem in problems.train
        for _ in range(recipe.examples_per_problem)
    ]
    with _one_thread():
        start = time.perf_counter()
        model = build_model(tokenizer, recipe.seed, recipe.experts)
        warm_up(model, tokenizer, examples, recipe.warmup, recipe.seed)
        logger.info("warm-up took %.0f s", time.perf_counter() - start)
        for name, greedy in (("greedy", True), ("sampled", False)):
            responses = respond(
                model, tokenizer, [p.prompt for p in problems.heldout], greedy=greedy
            )
            logger.info("held-out accuracy, %s: %.3f", name, accuracy(responses, problems.heldout))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def accuracy(responses: Sequence[str], problems: Sequence[Problem]) -> float:
    """Mean of the reward of `configs/demo.yaml`: the right result after the last `=`."""
    scores = [
        exact_match(response, str(problem.answer), {}, after="=")
        for response, problem in zip(responses, problems, strict=True)
    ]
    return sum(scores) / len(scores)


def _example(problem: Problem, recipe: Recipe, rng: random.Random) -> str:
    return tutor_response(problem, rng, habit_rate=recipe.habit_rate, slip_rate=recipe.slip_rate)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of float sums, hence the weights, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
