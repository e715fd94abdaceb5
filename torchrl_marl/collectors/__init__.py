"""How batches are collected; what then happens to them lives in objectives and can be imported from here, too."""

from torchrl_marl.collectors.clusters import AgentAutoencoder, cluster_agents, encode_agents
from torchrl_marl.collectors.compiled import CompiledCollector
from torchrl_marl.collectors.sequences import SequenceCollector
from torchrl_marl.collectors.workers import WorkerCollector, multiprocess_collector, ray_collector
from torchrl_marl.objectives.divergences import pairwise_kl
from torchrl_marl.objectives.minibatches import minibatches, sequence_minibatches, sequences_in, split_into_chunks
from torchrl_marl.objectives.reflection import NextStepKeys
from torchrl_marl.objectives.reuse import (
    ReuseMappingSampler,
    ReuseScheme,
    fixed_reuse_matrix,
    gated_reuse_matrix,
)

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
