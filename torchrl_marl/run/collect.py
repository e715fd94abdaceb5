"""The collector of a training loop, chosen by what the loop trains and where."""

from __future__ import annotations

from hydra.utils import instantiate
from omegaconf import DictConfig
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from torchrl_marl.collectors import CompiledCollector, SequenceCollector, WorkerCollector
from torchrl_marl.objectives import RatioLoss

__all__ = ["make_collector"]


def make_collector(
    cfg: DictConfig, env: EnvBase, policy: TensorDictModuleBase, loss: RatioLoss
) -> Collector | CompiledCollector | SequenceCollector | WorkerCollector:
    """Build the collector named by ``cfg.collector``, or by default the one in this process that suits loss and env.

    With ``compile=true``, VMAS and the games of this library get a
    :class:`~torchrl_marl.collectors.CompiledCollector`. Otherwise, losses that train on whole sequences get a
    :class:`~torchrl_marl.collectors.SequenceCollector`, and all others TorchRL's collector.

    Args:
        cfg: configuration with ``collector``, ``frames_per_batch`` and ``compile``.
        env: the environment, which carries the policy's memory.
        policy: policy with exploration.
        loss: the loss that trains on the batches.
    """
    options = {"frames_per_batch": cfg.frames_per_batch}
    if "_target_" in cfg.collector:
        return instantiate(cfg.collector, env, policy, **options)
    if cfg.compile and CompiledCollector.takes(env):
        return CompiledCollector(env, policy, **options)
    if loss.learns_sequences:
        return SequenceCollector(env, policy, **options)
    return Collector(env, policy, **options, total_frames=-1, auto_register_policy_transforms=False)
