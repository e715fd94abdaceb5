"""Collectors; operations on batches are defined in objectives and re-exported here."""

from torchrl_marl.collectors.compiled import CompiledCollector
from torchrl_marl.collectors.replay import ChunkReplayBuffer, epsilon_greedy
from torchrl_marl.collectors.sequences import SequenceCollector
from torchrl_marl.collectors.workers import WorkerCollector, multiprocess_collector, ray_collector
from torchrl_marl.objectives.minibatches import minibatches, sequence_minibatches, split_into_chunks
from torchrl_marl.objectives.reflection import NextStepKeys
from torchrl_marl.objectives.reuse import ReuseMappingSampler

__all__ = [
    "ChunkReplayBuffer",
    "CompiledCollector",
    "NextStepKeys",
    "ReuseMappingSampler",
    "SequenceCollector",
    "WorkerCollector",
    "epsilon_greedy",
    "minibatches",
    "multiprocess_collector",
    "ray_collector",
    "sequence_minibatches",
    "split_into_chunks",
]
