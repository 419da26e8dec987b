"""The miniature's tokenizer: a word is a token, the vocabulary is the grammar of captions.py, the chat template is
Qwen3's.

Saved by `save_pretrained`, loaded by `AutoTokenizer`; no code of this project is needed to read a saved one. A word
that the grammar does not know becomes <|unknown|>.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .captions import CELLS, RELATIONS
from .shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES

PAD, UNKNOWN, END_OF_TURN = "<|endoftext|>", "<|unknown|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, UNKNOWN, "<|im_start|>", END_OF_TURN, VISION_START, VISION_END, IMAGE, VIDEO, "<think>", "</think>")
ROLES = ("system", "user", "assistant")
MAX_CAPTION_TOKENS = 32  # any caption in its template; Z-Image pads captions to multiples of 32

# Qwen3's for what the miniature has: roles, generation prompt, thinking; and Qwen3-VL's for content in parts.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
"""


def words() -> list[str]:
    """Every word of the grammar, once, in an order that does not change."""
    phrases = ["a", "an", "and", "two", "on", "at the", "shape", "shapes", "background"]
    phrases += [*CELLS, *RELATIONS, *SIZES, *COLOURS, *SHAPES, *BACKGROUNDS]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, "\n", "\n\n", *ROLES, *words()]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        additional_special_tokens=[token for token in SPECIAL if token not in (PAD, UNKNOWN, END_OF_TURN)],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        model_max_length=512,
    )
