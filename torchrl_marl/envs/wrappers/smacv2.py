"""SMACv2: StarCraft II itself, in a separate process for every environment."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torchrl.data import Categorical
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions
from torchrl_marl.envs.wrappers.base import WrapperEnv
from torchrl_marl.envs.wrappers.gymnasium import SerialGame, SerialGymEnv, Turn
from torchrl_marl.signatures import hands_on_to

__all__ = ["make_smacv2"]

_PACKAGE = 'pip install "git+https://github.com/oxwhirl/smacv2.git" "protobuf<3.21"'
_GAME = (
    "StarCraft II was not found. It is not free software: download Blizzard's Linux package (4.10) from "
    "https://github.com/Blizzard/s2client-proto#linux-packages, unpack it and set SC2PATH to the folder StarCraftII, "
    "then unpack SMAC_Maps of https://github.com/oxwhirl/smacv2/releases into its folder Maps"
)
_RACES = {  # units, their weights, and units that must not form a whole team
    race: {"unit_types": units, "weights": weights, "exception_unit_types": exceptions}
    for race, units, weights, exceptions in (
        ("terran", ["marine", "marauder", "medivac"], [0.45, 0.45, 0.1], ["medivac"]),
        ("protoss", ["stalker", "zealot", "colossus"], [0.45, 0.45, 0.1], []),
        ("zerg", ["zergling", "baneling", "hydralisk"], [0.45, 0.1, 0.45], ["baneling"]),
    )
}


class _StarCraftGame(SerialGame):
    """A game with SMAC's interface: ``get_obs``, ``get_state``, ``get_avail_actions``, ``timeouts`` and ``step``."""

    def __init__(self, env: Any) -> None:
        self.env = env
        sizes = env.get_env_info()
        num_agents, num_actions = sizes["n_agents"], sizes["n_actions"]
        self.agents = [f"agent_{index}" for index in range(num_agents)]
        self.action_spec = Categorical(num_actions, shape=torch.Size([num_agents]))
        self.blank = {
            "observation": np.zeros((num_agents, sizes["obs_shape"]), np.float32),
            "action_mask": np.zeros((num_agents, num_actions), bool),
            "mask": np.zeros(num_agents, bool),
            "state": np.zeros(sizes["state_shape"], np.float32),
            "won": np.zeros(1, np.float32),
        }

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        try:
            self.env.reset()  # the returned value may be missing
        except FileNotFoundError as error:
            raise FileNotFoundError(_GAME) from error
        # Until an episode has been played to its end, SMAC would start another game at every reset and add its enemies'
        # health to the divisor of rewards.
        self.env.env._episode_count = max(self.env.env._episode_count, 1)
        return self._seen(won=False)

    def step(self, action: np.ndarray) -> Turn:
        timeouts = self.env.timeouts  # get_stats() divides by the number of battles, which may be 0
        reward, over, info = self.env.step(action.tolist())
        # An end without information means that the game was restarted.
        truncated = over and (not info or self.env.timeouts > timeouts)
        seen = self._seen(won=bool(info.get("battle_won")))
        return Turn(seen, [float(reward)] * len(self.agents), over and not truncated, truncated)

    def draw(self) -> np.ndarray:
        raise NotImplementedError("the game renders in its own window only")

    def _seen(self, *, won: bool) -> dict[str, np.ndarray]:
        legal = np.array(self.env.get_avail_actions(), dtype=bool)
        return {
            "observation": np.array(self.env.get_obs(), dtype=np.float32),
            "action_mask": legal,
            "mask": legal[:, 1:].sum(1) > 0,  # dead agents can only take action 0, no operation
            "state": np.array(self.env.get_state(), dtype=np.float32),
            "won": np.array([won], dtype=np.float32),
        }


@hands_on_to(WrapperEnv.__init__)
def make_smacv2(scenario: str = "terran_5_vs_5", *, max_steps: int = 200, **batch: Unpack[BatchOptions]) -> EnvBase:
    """Build a scenario of SMACv2, with teams and start positions drawn for every episode.

    The scenario requires StarCraft II. SMAX (``make_jaxmarl("smax-smacv2_5_units")``) has similar battles with its own
    physics and is a thousand times as fast. The reward is the team's, scaled by SMAC so that winning a battle gives
    about 20, in each copy by the health of its first enemies. Dead agents can only take action 0 and are unset in
    ``("agents", "mask")``. ``("info", "won")`` is 1 at the step that wins the battle. Winning and losing are
    terminations. Time limits are truncations, where SMAC itself reports terminations. Teams and start positions are
    drawn from generators that cannot be seeded.

    Args:
        scenario: ``RACE_N_vs_M``, optionally with the suffix ``_epo`` for extended partial observability; RACE is
            terran, protoss or zerg; papers use 5_vs_5, 10_vs_10, 10_vs_11, 20_vs_20 and 20_vs_23.
        max_steps: time limit of an episode; the maps have their own limit of 200.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`. Each environment is a process of the game; ``seed``
            seeds the first game, the following integers the other games.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        FileNotFoundError: at the first reset, if StarCraft II is not installed, with installation steps.
        ImportError: if ``smacv2`` is not installed, with the installation command.
        ValueError: if an argument is out of its range or the name has another form.
    """
    match = re.fullmatch(rf"({'|'.join(_RACES)})_(\d+)_vs_(\d+)(_epo)?", scenario)
    if match is None:
        raise ValueError(f"scenario must be RACE_N_vs_M[_epo], such as terran_5_vs_5; got {scenario!r}")
    try:
        from absl import flags  # pyright: ignore[reportMissingImports]
        from smacv2.env import StarCraftCapabilityEnvWrapper  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ImportError(f"SMACv2 is not on PyPI ({error}): {_PACKAGE}, in a separate environment") from error
    if not flags.FLAGS.is_parsed():  # PySC2 reads the flags when it starts the game
        flags.FLAGS(["torchrl_marl"])
    capabilities = {
        "n_units": int(match[2]),
        "n_enemies": int(match[3]),
        "team_gen": {"dist_type": "weighted_teams", **_RACES[match[1]], "observe": True},
        "start_positions": {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32},
    }
    view: dict[str, Any] = {"conic_fov": False, "obs_own_pos": True, "use_unit_ranges": True, "min_attack_range": 2}
    options = {"map_name": f"10gen_{match[1]}", "capability_config": capabilities, **view}
    if match[4]:
        options |= {"prob_obs_enemy": 0.0, "action_mask": False}
    seed = batch.get("seed")

    def make(index: int) -> SerialGame:
        own = None if seed is None else (seed + index) % 2**32
        return _StarCraftGame(StarCraftCapabilityEnvWrapper(**options, seed=own))

    return SerialGymEnv(make, max_steps=max_steps, shared_reward=False, **batch)
