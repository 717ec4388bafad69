"""The prompts of a run, for training and for evaluation, and the tokens that end a response."""

import json
import zlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.data.prompts import load_prompts, load_tokenizer
from megatron_cpgd.data.stream import PromptStream
from megatron_cpgd.errors import DataError
from megatron_cpgd.types import Prompt


class Prompts:
    """Training and evaluation prompts, loaded and checked before anything is started."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Raises DataError: data, tokenizer or chat template cannot be used."""
        self.tokenizer = load_tokenizer(
            config.model.tokenizer or config.model.path,
            trust_remote_code=config.model.trust_remote_code,
        )
        self.stop_token_ids = find_stop_tokens(self.tokenizer, config.model.path)
        self.train = self._load(config, config.data.path)
        self.eval = {
            name: self._load(config, each.path)[: each.max_prompts]
            for name, each in config.eval.sets.items()
        }
        self.stream = PromptStream(
            len(self.train),
            config.rollout.prompts_per_step,
            seed=config.run.seed,
            shuffle=config.data.shuffle,
            checksum=checksum(self.train),
        )

    def _load(self, config: ExperimentConfig, path: Path) -> list[Prompt]:
        data = config.data
        return load_prompts(
            path,
            tokenizer=self.tokenizer,
            prompt_key=data.prompt_key,
            answer_key=data.answer_key,
            system_prompt=data.system_prompt,
            chat_template=data.chat_template,
            max_prompt_tokens=data.max_prompt_tokens,
            too_long=data.too_long,
        )


def checksum(prompts: Sequence[Prompt]) -> int:
    """CRC-32 of the tokens of all prompts, in order."""
    crc = 0
    for prompt in prompts:
        crc = zlib.crc32(array("q", [len(prompt.token_ids), *prompt.token_ids]), crc)
    return crc


def find_stop_tokens(tokenizer: Any, model_dir: Path) -> list[int]:
    """End tokens of the tokenizer and of the model's generation_config.json.

    Raises:
        DataError: there is none, so that no response would ever end.
    """
    stop = {tokenizer.eos_token_id} - {None}
    file = model_dir / "generation_config.json"
    if file.is_file():
        more = json.loads(file.read_text()).get("eos_token_id")
        stop |= set(more if isinstance(more, list) else [more]) - {None}
    if not stop:
        raise DataError(
            f"neither the tokenizer {tokenizer.name_or_path} nor {file} names an end token; set "
            "eos_token in tokenizer_config.json"
        )
    return sorted(stop)
