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
    """Build what collects for a loop: what ``cfg.collector`` names, or in this process what suits the loss and ``env``.

    With ``compile=true`` environments that a :class:`~torchrl_marl.collectors.CompiledCollector` takes get that one:
    VMAS and the games of this library. Otherwise losses that learn whole sequences get a
    :class:`~torchrl_marl.collectors.SequenceCollector`, and all others TorchRL's own.

    Args:
        cfg: configuration with ``collector``, ``frames_per_batch`` and ``compile``.
        env: the environment, which carries the policy's memory.
        policy: what acts, with exploration.
        loss: what learns from the batches.
    """
    options = {"frames_per_batch": cfg.frames_per_batch}
    if "_target_" in cfg.collector:
        return instantiate(cfg.collector, env, policy, **options)
    if cfg.compile and CompiledCollector.takes(env):
        return CompiledCollector(env, policy, **options)
    if loss.learns_sequences:
        return SequenceCollector(env, policy, **options)
    return Collector(env, policy, **options, total_frames=-1, auto_register_policy_transforms=False)
