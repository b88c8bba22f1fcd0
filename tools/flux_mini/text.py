"""Tokenizers and text encoders of flux-mini.

T5 reads capital letters one by one (sub-word tokens would hide the spelling) and known lower-case words whole; CLIP,
whose pooled output carries the colours and shapes, reads ordinary byte-pair tokens.
"""

import json
import random
import re
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .scenes import caption, random_scene

WIDTH = 128
T5_LENGTH = 40
CLIP_LENGTH = 48


def corpus(seed: int = 0, size: int = 20_000) -> list[str]:
    rng = random.Random(seed)
    return [caption(random_scene(rng), rng) for _ in range(size)]


def build_t5_tokenizer() -> T5Tokenizer:
    """Unigram: every lower-case word of the captions is one piece, everything else falls apart into characters."""
    words = sorted({word for text in corpus() for word in re.findall(r"[a-z]+", text)})
    characters = string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(character, -8.0) for character in characters]
    vocabulary += [(f"▁{character}", -10.0) for character in characters if character not in words]
    vocabulary += [(f"▁{word}", -2.0) for word in words]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=T5_LENGTH)


def build_clip_tokenizer(captions: Sequence[str], length: int) -> CLIPTokenizer:
    """CLIP's lower-casing byte-pair encoding, its merges learned from the captions, for prompts of `length` tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        min_frequency=50,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    pieces = [" ".join(re.findall(r"[a-z]+|[^\sa-z]+", text.lower())) for text in captions]
    tokenizer.train_from_iterator(pieces, trainer)
    vocabulary = tokenizer.get_vocab()
    # CLIP closes every word with </w>. The trainer numbers the closed characters as its hash table has them, another
    # way in every process, and leaves out those that no caption ends with.
    closed = sorted(f"{character}</w>" for character in pre_tokenizers.ByteLevel.alphabet())
    found = [token for token in closed if token in vocabulary]
    vocabulary |= dict(zip(found, sorted(vocabulary[token] for token in found), strict=True))
    for token in closed:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=384,
            num_layers=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
