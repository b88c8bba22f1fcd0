"""A stand-in for nunchaku 1.2 that runs on any machine: its interfaces, with diffusers' arithmetic behind them.

What callers see is nunchaku's: class names and the modules they live in, signatures, the order of what is returned,
shapes, dtypes, padding, packed rotary embeddings, ControlNet stacks, the PuLID callback, IP-Adapter, offloading, LoRA,
and its own caches with what they leave behind. What is computed is what diffusers' blocks compute. Inputs that the
kernels would misread are refused here, and what the kernels assert, an AssertionError here, aborts the process there.
Left out: loading, tokenizers, pipelines, CUDA. `python -m pytest -m nunchaku` runs the tests on the real package.
"""

from . import caching
from .models import ip_adapter
from .models.transformers import (
    NunchakuFluxTransformer2dModel,
    NunchakuFluxTransformer2DModelV2,
    NunchakuQwenImageTransformer2DModel,
    NunchakuZImageTransformer2DModel,
)

__all__ = [
    "NunchakuFluxTransformer2DModelV2",
    "NunchakuFluxTransformer2dModel",
    "NunchakuQwenImageTransformer2DModel",
    "NunchakuZImageTransformer2DModel",
    "caching",
    "ip_adapter",
]
__version__ = "1.2.0+standin"
