"""diffusers' `ZImageTransformer2DModel`, and nunchaku's quantized subclass of it."""

from typing import Any

import torch
from torch import Tensor, nn

from .base import Adapter, BlockList, BlockModules, ModelCall, Role, flattened, modules_named
from .block_call import BlockCall, BlockInterface, JoinedBlockCall, Streams

BLOCK = BlockInterface(
    streams=("x",),
    returns=None,
    per_sample=("attn_mask", "freqs_cis", "adaln_input", "noise_mask", "adaln_noisy", "adaln_clean"),
    joined=True,
)
MULTIPLE = 32  # image and text are padded to so many tokens


class ZImageAdapter(Adapter):
    """Z-Image: one list, `layers`, on one tensor [image; text; padding]; the refiners before it always run.

    - The latents and the embeddings are lists, one entry a sample; the pipeline makes the lists anew at every step, of
      the same embeddings.
    - The model's timestep rises from 0 to 1.
    - Guidance is a doubled batch, prompts first; steps past `cfg_truncation` have a single one, and are a run of their
      own.
    - Image and text are padded to multiples of 32 tokens each; texts of different lengths then to the longest, with a
      mask. That padding counts where a method looks at the text (H2's second stage): a decision can differ from that of
      the sample alone.
    - Everything that a block takes has a batch dimension, the rotary table too.
    - Omni: lists in lists, [text; image; image features], and each token is modulated by the timestep or as clean.
    """

    family = "Z-Image"
    classes = ("ZImageTransformer2DModel",)
    block_lists = (BlockList("layers", interface=BLOCK),)
    branch_arguments = ("cap_feats",)
    control_arguments = ("controlnet_block_samples",)
    timestep_scale = 1000.0

    def block_call(self, role: Role, block: nn.Module) -> BlockCall:
        return ImageFirstBlockCall(block, BLOCK)

    def timestep(self, given: dict[str, Any]) -> Tensor:
        return 1 - given["t"].reshape(-1)

    def latents(self, given: dict[str, Any]) -> tuple[Tensor, int]:
        return flattened(given["x"])[0], len(given["x"])

    def describe(self, given: dict[str, Any]) -> ModelCall:
        call = super().describe(given)
        if isinstance(given["x"][0], list):  # omni: the image stands between others
            return call
        longest = max(len(text) for text in given["cap_feats"])
        return call._replace(text_tokens=longest + -longest % MULTIPLE)

    def modulated(self, block: nn.Module, arguments: dict[str, Any]) -> Tensor:
        def scale(name: str) -> Tensor:
            return block.adaLN_modulation(arguments[name]).chunk(4, dim=1)[0].unsqueeze(1)

        noisy = arguments.get("noise_mask")
        if noisy is None:
            scales = scale("adaln_input")
        else:
            scales = torch.where(noisy.unsqueeze(-1) == 1, scale("adaln_noisy"), scale("adaln_clean"))
        return block.attention_norm1(arguments["x"]) * (1 + scales)

    def modules(self, block: nn.Module) -> BlockModules:
        return modules_named(block, "attention", "feed_forward")


class ImageFirstBlockCall(JoinedBlockCall):
    """A block on one tensor [image; text] of shape (B, N+M, D), seen as the two streams that it holds."""

    def parse(self, output: Tensor, text_tokens: int) -> Streams:
        image_tokens = output.shape[1] - text_tokens
        return output[:, :image_tokens], output[:, image_tokens:]

    def result(self, streams: Streams) -> Tensor:
        return torch.cat(streams, dim=1)

    def clone_if_aliased(self, streams: Streams) -> Streams:
        return streams  # ControlNet samples make a new tensor
