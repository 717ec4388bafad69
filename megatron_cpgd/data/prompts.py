"""From data rows to tokenized prompts."""

import logging
from pathlib import Path
from typing import Any, Literal

from megatron_cpgd.data.source import read_rows, summarize_errors
from megatron_cpgd.errors import DataError
from megatron_cpgd.types import Prompt

logger = logging.getLogger(__name__)


def load_tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer in the folder `path`; nothing is downloaded.

    Raises:
        DataError: no such folder, or no tokenizer in it that transformers can load.
    """
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise DataError(f"{path}: no such folder; check model.tokenizer and model.path")
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds, also plain Exception
        raise DataError(
            f"{path}: transformers cannot load a tokenizer ({type(error).__name__}: {error}); "
            "check model.tokenizer, and model.trust_remote_code if it needs its own code"
        ) from error


def load_prompts(
    path: Path,
    *,
    tokenizer: Any,
    prompt_key: str,
    answer_key: str | None,
    system_prompt: str | None,
    chat_template: bool,
    max_prompt_tokens: int,
    too_long: Literal["error", "drop"],
) -> list[Prompt]:
    """Prompts of the data at `path`, in file order; the id of a prompt is `<file stem>:<row>`.

    With `chat_template`, a string becomes one user message, and a list of {role, content} messages
    is taken as it is; the generation prompt is appended. Without it, the prompt must be a string
    and is tokenized like any text, with the special tokens that the tokenizer adds by itself.

    Raises:
        DataError: unreadable data; bad rows (all are checked, the first are listed); prompts over
            `max_prompt_tokens` with `too_long="error"`; nothing left; no chat template.
    """
    _check_chat_template(tokenizer, chat_template, system_prompt)
    rows = read_rows(path)
    texts, answers, errors = [], [], []
    for number, row in enumerate(rows):
        try:
            text = _render(row, prompt_key, system_prompt, tokenizer if chat_template else None)
            answer = _read_answer(row, answer_key)
        except ValueError as error:
            errors.append(f"row {number}: {error}")
            continue
        texts.append(text)
        answers.append(answer)
    if errors:
        raise DataError(
            f"{path}: {len(errors)} of {len(rows)} rows are unusable:{summarize_errors(errors)}"
        )
    token_ids = tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]
    used = {prompt_key, answer_key}
    prompts = [
        Prompt(
            id=f"{path.stem}:{number}",
            token_ids=list(ids),
            text=text,
            answer=answer,
            fields={key: value for key, value in row.items() if key not in used},
        )
        for number, (row, text, answer, ids) in enumerate(
            zip(rows, texts, answers, token_ids, strict=True)
        )
    ]
    return _limit_length(prompts, path, max_prompt_tokens, too_long)


def _check_chat_template(tokenizer: Any, chat_template: bool, system_prompt: str | None) -> None:
    if chat_template and not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; set "
            "data.chat_template=false or give a tokenizer with one (model.tokenizer)"
        )
    if not chat_template and system_prompt is not None:
        raise DataError(
            "data.system_prompt needs data.chat_template=true: without a template there are no "
            "roles; put the text into the prompts instead"
        )


def _render(row: dict[str, Any], key: str, system_prompt: str | None, tokenizer: Any | None) -> str:
    """The text of one prompt; `tokenizer` is None when prompts are fed as they are."""
    if key not in row:
        raise ValueError(f"no column {key!r}; it has {sorted(row)} (data.prompt_key)")
    prompt = row[key]
    if tokenizer is None:
        if not isinstance(prompt, str):
            raise ValueError(
                f"{key!r} is {type(prompt).__name__}; data.chat_template=false needs a string"
            )
        return _require_text(prompt, key)
    messages = _to_messages(prompt, key)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template raises is about this row's messages
        raise ValueError(f"the chat template refuses {key!r}: {error}") from error
    return _require_text(text, key)


def _to_messages(prompt: Any, key: str) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": _require_text(prompt, key)}]
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{key!r} must be a string or a list of messages, got {type(prompt).__name__} "
            f"{str(prompt)[:40]!r}"
        )
    for message in prompt:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(field), str) for field in ("role", "content")
        ):
            raise ValueError(
                f"{key!r} has a message that is not {{role: text, content: text}}: "
                f"{str(message)[:80]}"
            )
    return prompt


def _require_text(text: str, key: str) -> str:
    if not text.strip():
        raise ValueError(f"{key!r} is empty")
    return text


def _read_answer(row: dict[str, Any], key: str | None) -> str | None:
    if key is None:
        return None
    if key not in row:
        raise ValueError(f"no column {key!r}; it has {sorted(row)} (data.answer_key)")
    answer = row[key]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"{key!r} must be text or a number, got {type(answer).__name__}")
    return str(answer)


def _limit_length(
    prompts: list[Prompt], path: Path, max_prompt_tokens: int, too_long: Literal["error", "drop"]
) -> list[Prompt]:
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_prompt_tokens]
    long = [prompt for prompt in prompts if len(prompt.token_ids) > max_prompt_tokens]
    if long and too_long == "error":
        lengths = [f"{prompt.id}: {len(prompt.token_ids)} tokens" for prompt in long]
        raise DataError(
            f"{path}: {len(long)} of {len(prompts)} prompts are longer than "
            f"data.max_prompt_tokens={max_prompt_tokens}; raise it, or set data.too_long=drop:"
            f"{summarize_errors(lengths)}"
        )
    if not kept:
        raise DataError(
            f"{path}: all {len(prompts)} prompts are longer than "
            f"data.max_prompt_tokens={max_prompt_tokens}; nothing is left"
        )
    if long:
        logger.warning(
            "%s: dropped %d of %d prompts longer than %d tokens",
            path, len(long), len(prompts), max_prompt_tokens,
        )  # fmt: skip
    return kept
