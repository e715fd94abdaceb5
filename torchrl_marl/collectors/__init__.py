"""How batches are collected, and what happens to them before a loss gets them."""

from torchrl_marl.collectors.chunks import split_into_chunks
from torchrl_marl.collectors.compiled import CompiledCollector
from torchrl_marl.collectors.reflection import NextStepKeys
from torchrl_marl.collectors.reuse import (
    ReuseMappingSampler,
    ReuseScheme,
    fixed_reuse_matrix,
    gated_reuse_matrix,
    pairwise_kl,
)
from torchrl_marl.collectors.sequences import SequenceCollector, sequence_minibatches

__all__ = [
    "CompiledCollector",
    "NextStepKeys",
    "ReuseMappingSampler",
    "ReuseScheme",
    "SequenceCollector",
    "fixed_reuse_matrix",
    "gated_reuse_matrix",
    "pairwise_kl",
    "sequence_minibatches",
    "split_into_chunks",
]
