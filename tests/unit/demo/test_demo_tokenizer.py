"""The demo's tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_cpgd.demo.tokenizer import CHARACTERS, END, PAD, VOCABULARY, build_tokenizer

TOKENIZER = build_tokenizer(128)


@given(st.text(alphabet=CHARACTERS) | st.sampled_from(["user", "system\nuser 1", "assistant"]))
def test_text_over_the_alphabet_decodes_to_itself(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_every_character_is_one_token_and_a_role_is_one_token():
    assert TOKENIZER.encode("37+58=") == [VOCABULARY.index(c) for c in "37+58="]
    assert TOKENIZER.encode("user") == [VOCABULARY.index("user")]


def test_other_characters_become_the_unknown_token():
    assert TOKENIZER.encode("1é2") == [VOCABULARY.index(t) for t in ("1", "<|unk|>", "2")]


def test_vocabulary_splits_over_eight_ranks_and_its_special_tokens_differ():
    assert len(TOKENIZER) == len(set(VOCABULARY)) == 32
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.eos_token_id) == END
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER.pad_token_id) == PAD


@pytest.mark.parametrize("loaded", [False, True])
def test_chat_template_renders_chatml_with_fourteen_tokens(tmp_path, loaded):
    tokenizer = TOKENIZER
    if loaded:
        TOKENIZER.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "37+58="}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\n37+58=<|im_end|>\n<|im_start|>assistant\n"
    # start, user, newline, 6 characters, end, newline, start, assistant, newline
    assert len(tokenizer.encode(text)) == 14
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == (
        "user\n37+58=\nassistant\n"
    )
