"""A complete Flux pipeline of a few thousand random weights, for tests that need the architecture and not the pictures.

Random, but not dead: diffusers' own initialisation leaves the AdaLN gates near zero, so that every block is almost
the identity and any cache looks right. Here gates and residuals are of order one and follow the timestep.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_TOKENS = 24  # what the tests pass as max_sequence_length
CLIP_WIDTH = 16
T5_WIDTH = 24
LATENT_CHANNELS = 4


def tiny_transformer(double: int = 2, single: int = 3, seed: int = 0, guidance: bool = True) -> FluxTransformer2DModel:
    """A FluxTransformer2DModel of width 32 in eval mode; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * LATENT_CHANNELS,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=CLIP_WIDTH,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )
        _enliven(transformer)
    return transformer.eval()


def save_tiny_pipeline(folder: Path, *, double: int = 2, single: int = 3, seed: int = 0, guidance: bool = True) -> Path:
    """Write what `FluxPipeline.from_pretrained(folder)` loads without a network, and return the folder.

    Heights and widths are multiples of 16; 32 px are 4 image tokens, 64 px are 16.
    """
    transformer = tiny_transformer(double, single, seed, guidance)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        tokenizer, tokenizer_2 = _clip_tokenizer(), _t5_tokenizer()
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
            ),
            vae=_vae(),
            text_encoder=_clip(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=_t5(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def save_tiny_controlnet(folder: Path, seed: int = 0) -> Path:
    """Write a ControlNet for the tiny pipeline, with one block of each kind that adds what its picture decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = tiny_transformer(seed=seed)
        heads = {name: transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
        controlnet = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)
        _enliven(controlnet)
    controlnet.save_pretrained(folder)
    return Path(folder)


def _enliven(transformer: FluxTransformer2DModel | FluxControlNetModel) -> None:
    """Give each linear layer outputs of order one: weights of variance 1 / fan_in instead of torch's third of it.

    Of the timestep's sinusoids only the slow ones count (periods over 600 of the 1000 timesteps): neighbouring steps
    then differ by a few percent, as in a trained model, and thresholds have something to decide.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.normal_(module.bias, std=0.1)
    from_sinusoids = transformer.time_text_embed.timestep_embedder.linear_1.weight.data
    slow = torch.arange(128) >= 64  # 128 cosines, then 128 sines, both of frequency 10000 ** (-k / 128)
    from_sinusoids *= 2 * slow.repeat(2)


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    return vae.eval()


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=T5_WIDTH, d_kv=12, d_ff=2 * T5_WIDTH, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def _clip_tokenizer() -> CLIPTokenizer:
    """One token a letter: an alphabet and no merges, so that there is nothing to train."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _t5_tokenizer() -> T5TokenizerFast:
    letters = [(chr(code), -2.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
