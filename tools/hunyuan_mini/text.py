"""Tokenizers and text encoders of hunyuan-mini.

Llama, whose states the transformer attends to, reads every word of the grammar as one token; CLIP, whose pooled output
the transformer is told at every block, reads ordinary byte-pair tokens.
"""

import random
import re
import string

import torch
from transformers import CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizer

from tools.flux_mini.text import WIDTH, build_clip_tokenizer

from .clips import HELD_OUT_PHRASINGS, PHRASINGS, caption, random_clip

LLAMA_LENGTH = 24
CLIP_LENGTH = 77  # what HunyuanVideoPipeline pads to
# HunyuanVideo's own template asks a language model to describe a video; here the prompt is all there is.
PROMPT_TEMPLATE = {"template": "{}", "crop_start": 0}
SKIPPED_LAYERS = 2  # the last ones, whose output the pipeline does not use


def corpus(seed: int = 0, size: int = 10_000) -> list[str]:
    rng = random.Random(seed)
    return [caption(random_clip(rng), rng, PHRASINGS + HELD_OUT_PHRASINGS) for _ in range(size)]


def build_llama_tokenizer() -> LlamaTokenizer:
    """Byte-pair encoding that grows a word from its first letter, so that every word of the captions is one token and
    any other falls apart into the longest beginning of such a word, and letters."""
    words = {word for text in corpus() for word in re.findall(r"[a-z]+", text)}
    beginnings = sorted({word[:end] for word in words for end in range(1, len(word) + 1)}, key=lambda b: (len(b), b))
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    characters = [*string.ascii_letters, *string.digits, *string.punctuation]
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *bytes_, "▁", *characters, *(f"▁{b}" for b in beginnings)]
    return LlamaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(f"▁{beginning[:-1]}", beginning[-1]) for beginning in beginnings],
        pad_token="<pad>",
        padding_side="right",  # the transformer is given the number of tokens, which come first
        model_max_length=LLAMA_LENGTH,
        add_bos_token=True,  # so that no prompt is without a token
    )


def build_hunyuan_clip_tokenizer() -> CLIPTokenizer:
    return build_clip_tokenizer(corpus(), CLIP_LENGTH)


def build_llama(tokenizer: LlamaTokenizer) -> LlamaModel:
    model = LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2 + SKIPPED_LAYERS,
            num_attention_heads=4,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # No norm follows the layer that the pipeline reads, so that the words' size is what they start with.
    torch.nn.init.normal_(model.embed_tokens.weight)
    return model
