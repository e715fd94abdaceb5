"""Whether a run is long enough to be compiled, told from its configuration alone."""

from __future__ import annotations

from hydra.utils import get_object
from omegaconf import DictConfig

__all__ = ["choose_compilation"]

# Seconds of one core, benchmarks/results/speed.md, profile.md and autoregressive.md; the least that was found.
_SAVED_IN_A_STEP = {"torchrl_marl.envs.vmas": 5e-3, "torchrl_marl.envs.games": 1.3e-3}  # of all environments
_SAVED_IN_AN_UPDATE = 3e-3  # of a policy; a guider is another one
_SAVED_IN_A_ROW = 2e-6  # of a minibatch
_SAVED_WITH_REPLAY = 20e-3  # more in an update of action values and mixer with their targets
_SAVED_MORE = {  # than with an MLP, in a step and in an update
    "torchrl_marl.modules.make_recurrent_actor": (0.4e-3, 10e-3),
    "torchrl_marl.modules.make_mat": (0.4e-3, 4e-3),
    "torchrl_marl.modules.make_sable": (1.8e-3, 7e-3),
}
_COMPILING_MLPS, _COMPILING_OTHERS = 30, 120


def choose_compilation(cfg: DictConfig) -> tuple[bool, str]:
    """Return whether a run gains by compiling, and why in one line.

    It compares the steps and updates of the whole run with the compiler's time without code of earlier runs. The
    choice is a function of the configuration, so that a run repeats and goes on as it began.

    Args:
        cfg: resolved configuration of a run.
    """
    steps = cfg.total_frames / (cfg.env.num_envs * cfg.processes)
    minibatches = -(-cfg.frames_per_batch // cfg.minibatch_size)
    updates = cfg.total_frames / (cfg.frames_per_batch * cfg.processes) * cfg.epochs * minibatches
    is_mlp = (
        cfg.actor.get("_target_") == "torchrl_marl.modules.make_actor"
        and cfg.actor.get("share_parameters", True) is True  # each agent's phase is a graph of its own
        and "guider" not in cfg
        and cfg.chunk_length is None
    )
    policies = [cfg.actor.get("_target_"), *([cfg.guider._target_] if "guider" in cfg else [])]
    more = [_SAVED_MORE.get(policy, (0, 0)) for policy in policies]
    of_any = _SAVED_IN_AN_UPDATE + cfg.minibatch_size * _SAVED_IN_A_ROW
    saved = updates * sum(of_any + in_an_update for _, in_an_update in more)
    saved += updates * _SAVED_WITH_REPLAY * ("buffer" in cfg)
    if "_target_" not in cfg.collector:
        module = get_object(cfg.env._target_).__module__
        for name, of_any in _SAVED_IN_A_STEP.items():
            if module.startswith(name):
                saved += steps * (of_any + sum(in_a_step for in_a_step, _ in more))
    needed = _COMPILING_MLPS if is_mlp else _COMPILING_OTHERS
    verb, relation = ("compiles", "more") if saved > needed else ("does not compile", "no more")
    return saved > needed, (
        f"compile=auto {verb}: {round(steps):,} steps and {round(updates):,} updates save some {saved:.0f} s, "
        f"{relation} than the {needed} s that compiling takes the first time."
    )
