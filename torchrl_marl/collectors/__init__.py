"""What happens to collected batches before a loss gets them."""

from torchrl_marl.collectors.chunks import split_into_chunks
from torchrl_marl.collectors.reflection import NextStepKeys
from torchrl_marl.collectors.reuse import (
    ReuseMappingSampler,
    ReuseScheme,
    fixed_reuse_matrix,
    gated_reuse_matrix,
    pairwise_kl,
)

__all__ = [
    "NextStepKeys",
    "ReuseMappingSampler",
    "ReuseScheme",
    "fixed_reuse_matrix",
    "gated_reuse_matrix",
    "pairwise_kl",
    "split_into_chunks",
]
