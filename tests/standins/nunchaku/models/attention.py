"""The MLP of quantized blocks."""

from diffusers.models.attention import FeedForward
from torch import Tensor

from ..ops.fused import fused_gelu_mlp
from .linear import SVDQW4A4Linear


class NunchakuFeedForward(FeedForward):
    """Two linear layers and GELU, in one kernel that calls none of them."""

    def __init__(self, ff: FeedForward):
        super(FeedForward, self).__init__()
        self.net = ff.net
        self.net[0].proj = SVDQW4A4Linear.from_linear(ff.net[0].proj)
        self.net[2] = SVDQW4A4Linear.from_linear(ff.net[2])

    def forward(self, hidden_states: Tensor) -> Tensor:
        return fused_gelu_mlp(hidden_states, self.net[0].proj, self.net[2])
