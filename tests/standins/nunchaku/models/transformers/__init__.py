"""The two generations of quantized Flux."""

from .transformer_flux import NunchakuFluxTransformer2dModel
from .transformer_flux_v2 import NunchakuFluxTransformer2DModelV2

__all__ = ["NunchakuFluxTransformer2DModelV2", "NunchakuFluxTransformer2dModel"]
