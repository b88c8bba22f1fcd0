"""Block Cache: the first-block cache of ParaAttention, nunchaku and diffusers."""

from dataclasses import dataclass

from h2cache.config import CacheConfig
from h2cache.policy.forecasts import Taylor
from h2cache.policy.probes import FirstBlockResidual
from h2cache.policy.rules import Threshold
from h2cache.policy.stages import NETWORK, BlockStage


@dataclass(frozen=True)
class BlockCacheConfig(CacheConfig):
    """One stage, the whole network, behind its first block.

    The residual of the first block's image tokens, not pooled, is compared with that of the last computed
    step; below `threshold` (relative L1, strict; negative: never) every later block is replaced by the residual that
    they added to both streams together. 0.12 is nunchaku's default; diffusers' is 0.05.

    Memory per image and guidance branch, with N image and M text tokens of width D: the residual, (N, D) and (M, D),
    in the model's dtype, and the reference, (N, D) in float32. At FLUX.1-dev, 1024x1024, bfloat16: 28 MB and 50 MB.
    """

    record_name = "baselines.block_cache.BlockCacheConfig"

    threshold: float = 0.12

    def __post_init__(self) -> None:
        super().__post_init__()
        self._threshold("threshold")

    def compose(self) -> tuple[BlockStage, ...]:
        network = BlockStage(
            name="network",
            roles=NETWORK,
            probe=FirstBlockResidual(),
            rule=Threshold(self.threshold),
            forecast=Taylor(0),
        )
        return (network,)
