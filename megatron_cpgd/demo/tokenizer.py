"""A tokenizer with one token per character, for arithmetic in the ChatML format."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
CHARACTERS = "\n 0123456789+-*/=().,:;?!"
VOCABULARY = (PAD, UNKNOWN, START, END, *ROLES, *CHARACTERS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose tokens are the entries of `VOCABULARY`; `<|im_end|>` ends a response.

    Text over `CHARACTERS` decodes to itself; any other character becomes `<|unk|>`.

    Args:
        max_length: longest sequence of the model, in tokens.
    """
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    # A role name is one token, so that a prompt is mostly its problem. `[\s\S]` is any character,
    # line breaks included.
    pieces = Regex("|".join((*ROLES, r"[\s\S]")))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
