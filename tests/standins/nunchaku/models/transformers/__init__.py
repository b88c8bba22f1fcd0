"""The two generations of quantized Flux, and quantized Qwen-Image and Z-Image."""

from .transformer_flux import NunchakuFluxTransformer2dModel
from .transformer_flux_v2 import NunchakuFluxTransformer2DModelV2
from .transformer_qwenimage import NunchakuQwenImageTransformer2DModel
from .transformer_zimage import NunchakuZImageTransformer2DModel

__all__ = [
    "NunchakuFluxTransformer2DModelV2",
    "NunchakuFluxTransformer2dModel",
    "NunchakuQwenImageTransformer2DModel",
    "NunchakuZImageTransformer2DModel",
]
