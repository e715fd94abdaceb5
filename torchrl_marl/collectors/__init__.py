"""How batches are collected, and what happens to them before a loss gets them."""

from torchrl_marl.collectors.chunks import minibatches, split_into_chunks
from torchrl_marl.collectors.clusters import AgentAutoencoder, cluster_agents, encode_agents
from torchrl_marl.collectors.compiled import CompiledCollector
from torchrl_marl.collectors.reflection import NextStepKeys
from torchrl_marl.collectors.reuse import (
    ReuseMappingSampler,
    ReuseScheme,
    fixed_reuse_matrix,
    gated_reuse_matrix,
    pairwise_kl,
)
from torchrl_marl.collectors.sequences import SequenceCollector, sequence_minibatches, sequences_in
from torchrl_marl.collectors.workers import WorkerCollector, multiprocess_collector, ray_collector

__all__ = [
    "AgentAutoencoder",
    "CompiledCollector",
    "NextStepKeys",
    "ReuseMappingSampler",
    "ReuseScheme",
    "SequenceCollector",
    "WorkerCollector",
    "cluster_agents",
    "encode_agents",
    "fixed_reuse_matrix",
    "gated_reuse_matrix",
    "minibatches",
    "multiprocess_collector",
    "pairwise_kl",
    "ray_collector",
    "sequence_minibatches",
    "sequences_in",
    "split_into_chunks",
]
