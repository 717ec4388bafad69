import json
import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_cpgd.data.prompts import load_prompts, load_tokenizer
from megatron_cpgd.errors import DataError

WORDS = ["<unk>", "<bos>", "<user>", "<system>", "<assistant>", "one", "two", "three", "be", "kind"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template=TEMPLATE):
    """One token per word; puts <bos> before text when asked for special tokens."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", chat_template=template
    )


@pytest.fixture
def load(tmp_path):
    def load_rows(*rows, tokenizer=None, **settings):
        path = tmp_path / "math.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        defaults = {
            "prompt_key": "prompt",
            "answer_key": "answer",
            "system_prompt": None,
            "chat_template": True,
            "max_prompt_tokens": 100,
            "too_long": "error",
        }
        return load_prompts(path, tokenizer=tokenizer or make_tokenizer(), **defaults | settings)

    return load_rows


def words(prompt):
    return [WORDS[token] for token in prompt.token_ids]


def test_string_becomes_one_user_message(load):
    (prompt,) = load({"prompt": "one two", "answer": "3", "level": 5})
    assert prompt.text == "<user> one two <assistant>"
    assert words(prompt) == ["<user>", "one", "two", "<assistant>"]  # no second <bos>
    assert (prompt.id, prompt.answer, prompt.fields) == ("math:0", "3", {"level": 5})


def test_messages_are_taken_as_they_are_behind_the_system_prompt(load):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    (prompt,) = load({"prompt": messages, "answer": "3"}, system_prompt="be kind")
    assert words(prompt) == [
        "<system>", "be", "kind", "<user>", "one", "<assistant>", "two", "<user>", "three",
        "<assistant>",
    ]  # fmt: skip


def test_without_template_the_text_gets_the_special_tokens_of_the_tokenizer(load):
    (prompt,) = load({"prompt": "one two", "answer": "3"}, chat_template=False)
    assert prompt.text == "one two"
    assert words(prompt) == ["<bos>", "one", "two"]


def test_number_as_answer_becomes_text_and_no_answer_key_means_none(load):
    assert [p.answer for p in load({"prompt": "one", "answer": 7})] == ["7"]
    (prompt,) = load({"prompt": "one", "answer": 7}, answer_key=None)
    assert prompt.answer is None
    assert prompt.fields == {"answer": 7}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "one", "answer": "1"},
            r"no column 'prompt'; it has \['answer', 'question'\]",
        ),
        ({"prompt": "one"}, r"no column 'answer'; it has \['prompt'\]"),
        ({"prompt": "  ", "answer": "1"}, "'prompt' is empty"),
        ({"prompt": 3, "answer": "1"}, "must be a string or a list of messages, got int '3'"),
        ({"prompt": [], "answer": "1"}, "must be a string or a list of messages, got list"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, "a message that is not"),
        ({"prompt": [{"role": "tool", "content": "x"}], "answer": "1"}, "no tools here"),
        ({"prompt": "one", "answer": None}, "'answer' must be text or a number, got NoneType"),
        ({"prompt": "one", "answer": True}, "got bool"),
        ({"prompt": "one", "answer": ["1"]}, "got list"),
    ],
)
def test_bad_row_is_named_with_its_reason(load, row, message):
    with pytest.raises(DataError, match=f"1 of 2 rows are unusable:\n  row 1: .*{message}"):
        load({"prompt": "one", "answer": "1"}, row)


def test_first_five_bad_rows_are_shown_and_all_are_counted(load):
    with pytest.raises(DataError) as caught:
        load({"prompt": "one", "answer": "1"}, *[{"prompt": ""}] * 7)
    message = str(caught.value)
    assert "7 of 8 rows" in message
    assert [n for n in range(9) if f"row {n}:" in message] == [1, 2, 3, 4, 5]
    assert message.endswith("and 2 more")


def test_messages_need_the_chat_template(load):
    with pytest.raises(DataError, match=r"data\.chat_template=false needs a string"):
        load({"prompt": [{"role": "user", "content": "x"}], "answer": "1"}, chat_template=False)


def test_tokenizer_without_chat_template_is_refused(load):
    with pytest.raises(DataError, match=r"set data\.chat_template=false or give a tokenizer"):
        load({"prompt": "one", "answer": "1"}, tokenizer=make_tokenizer(template=None))


def test_system_prompt_without_chat_template_is_refused(load):
    with pytest.raises(DataError, match=r"data\.system_prompt needs data\.chat_template=true"):
        load({"prompt": "one", "answer": "1"}, chat_template=False, system_prompt="be kind")


LONG_AND_SHORT = [
    {"prompt": "one two three", "answer": "1"},  # 5 tokens with <user> and <assistant>
    {"prompt": "one two", "answer": "1"},  # 4
]


def test_prompt_at_the_limit_is_kept_and_one_over_it_is_named(load):
    assert len(load(*LONG_AND_SHORT, max_prompt_tokens=5)) == 2
    with pytest.raises(DataError, match=r"1 of 2 prompts .*max_prompt_tokens=4.*\n  math:0: 5 tok"):
        load(*LONG_AND_SHORT, max_prompt_tokens=4)


def test_dropped_prompts_are_counted_and_the_rest_keep_their_row_numbers(load, caplog):
    with caplog.at_level(logging.WARNING):
        prompts = load(*LONG_AND_SHORT, max_prompt_tokens=4, too_long="drop")
    assert [prompt.id for prompt in prompts] == ["math:1"]
    assert "dropped 1 of 2 prompts longer than 4 tokens" in caplog.text


def test_dropping_everything_is_refused(load):
    with pytest.raises(DataError, match=r"all 2 prompts are longer than .*; nothing is left"):
        load(*LONG_AND_SHORT, max_prompt_tokens=3, too_long="drop")


def test_tokenizer_is_loaded_from_its_folder(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, trust_remote_code=False)
    assert tokenizer("one two", add_special_tokens=False)["input_ids"] == [5, 6]
    assert tokenizer.chat_template == TEMPLATE


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_tokenizer(tmp_path / "none", trust_remote_code=False)
    with pytest.raises(DataError, match="cannot load a tokenizer"):
        load_tokenizer(tmp_path, trust_remote_code=False)
