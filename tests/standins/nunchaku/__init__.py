"""A stand-in for nunchaku 1.2 that runs on any machine: its interfaces, with diffusers' arithmetic behind them.

What callers see is nunchaku's: class names and the modules they live in, signatures, the order of what is returned,
shapes, dtypes, padding, packed rotary embeddings, ControlNet stacks, the PuLID callback, offloading, LoRA. What is
computed is what diffusers' blocks compute. Inputs that the kernels would misread are refused here. Left out: loading,
tokenizers, pipelines, CUDA. `python -m pytest -m nunchaku` runs the tests on the real package.
"""

from .models.transformers.transformer_flux import NunchakuFluxTransformer2dModel
from .models.transformers.transformer_flux_v2 import NunchakuFluxTransformer2DModelV2

__all__ = ["NunchakuFluxTransformer2DModelV2", "NunchakuFluxTransformer2dModel"]
__version__ = "1.2.0+standin"
