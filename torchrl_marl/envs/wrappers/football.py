"""Google Research Football: academy scenarios and matches, agents on the left team."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from torchrl.data import Categorical
from torchrl.envs import EnvBase
from typing_extensions import Unpack

from torchrl_marl.envs.base import BatchOptions
from torchrl_marl.envs.wrappers.base import WrapperEnv
from torchrl_marl.envs.wrappers.gymnasium import SerialGame, SerialGymEnv, Turn
from torchrl_marl.extras import import_extra
from torchrl_marl.signatures import hands_on_to

__all__ = ["make_football"]

_ACTIVE = slice(97, 108)  # one-hot index of the observing player, within the 115 numbers
_CHECKPOINTS, _CHECKPOINT_REWARD = 10, 0.1


class _FootballGame(SerialGame):
    """A match of the engine, observed as ``simple115v2``."""

    def __init__(self, scenario: str, num_agents: int, checkpoints: bool) -> None:
        football, self._checkpoints = import_extra("gfootball.env.football_env", "football"), checkpoints
        self._convert = import_extra("gfootball.env.wrappers", "football").Simple115StateWrapper.convert_observation
        players = [f"agent:left_players={num_agents}"]
        config = import_extra("gfootball.env.config", "football").Config({"level": scenario, "players": players})
        self._config, self.env = config, football.FootballEnv(config)
        self.agents = [f"left_{index}" for index in range(num_agents)]
        self.action_spec = Categorical(19, shape=torch.Size([num_agents]))
        numbers = np.zeros((num_agents, 115), np.float32)
        self.blank = {"observation": numbers, "state": np.delete(numbers[0], _ACTIVE), "goals": np.zeros(1, np.float32)}

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        self._config["game_engine_random_seed"] = seed
        self._config["reverse_team_processing"] = bool(seed % 2)  # the engine would keep the value of the first episode
        self._passed, self._goals = np.zeros(len(self.agents), dtype=int), 0
        return self._seen(self.env.reset())

    def step(self, action: np.ndarray) -> Turn:
        observation, reward, over, info = self.env.step(action.tolist())
        at_limit, scored = observation[0]["steps_left"] == 0 and info["score_reward"] == 0, info["score_reward"] > 0
        self._goals += scored
        if self._checkpoints:
            reward = reward + self._checkpoint_reward(observation, scored)
        return Turn(self._seen(observation), reward.tolist(), over and not at_limit, over and at_limit)

    def draw(self) -> np.ndarray:
        raise NotImplementedError("its engine renders with OpenGL only")

    def _checkpoint_reward(self, observation: list[dict[str, Any]], scored: bool) -> np.ndarray:
        """0.1 for each of ten rings around the goal that an agent carries the ball into first.

        The rings have distances from 0.99 to 0.19 (half the pitch is 1); a goal pays all remaining rings.
        """
        passed = self._passed.copy()
        for index, own in enumerate(observation):
            x, y = own["ball"][:2]
            inside = math.floor((0.99 - math.hypot(x - 1, y)) * (_CHECKPOINTS - 1) / 0.8 + 1e-6) + 1
            if scored:
                passed[index] = _CHECKPOINTS
            elif own["ball_owned_team"] == 0 and own["ball_owned_player"] == own["active"]:
                passed[index] = max(passed[index], min(inside, _CHECKPOINTS))
        earned, self._passed = passed - self._passed, passed
        return _CHECKPOINT_REWARD * earned.astype(np.float32)

    def _seen(self, observation: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        numbers = self._convert(observation, True)
        goals = np.array([self._goals], dtype=np.float32)
        return {"observation": numbers, "state": np.delete(numbers[0], _ACTIVE), "goals": goals}


@hands_on_to(WrapperEnv.__init__)
def make_football(
    scenario: str = "academy_3_vs_1_with_keeper",
    *,
    num_agents: int = 3,
    max_steps: int = 400,
    checkpoints: bool = True,
    shared_reward: bool = False,
    **batch: Unpack[BatchOptions],
) -> EnvBase:
    """Build a scenario of Google Research Football, where agents control the first players of the left team.

    Observations are the 115 numbers of ``simple115v2``: positions and directions of all players and the ball, ball
    possession, the observing player and the game mode. ``"state"`` is the same without the observing player, ``[104]``.
    All 19 actions are always legal. ``("info", "goals")`` counts the left team's goals in the episode. A goal, and in
    academy scenarios the loss of the ball, are terminations; the time limits, ``max_steps`` and the scenario's own, are
    truncations.

    Args:
        scenario: a module of ``gfootball.scenarios``.
        num_agents: number of controlled players. Papers use 3 in academy_3_vs_1_with_keeper, 2 in the two
            pass_and_shoot scenarios, 4 in the counterattacks and 5_vs_5, 10 in academy_corner and 11_vs_11.
        max_steps: time limit of an episode.
        checkpoints: whether a player also earns 0.1 for each of ten rings around the goal that it carries the ball
            into.
        shared_reward: whether every agent gets the sum of all agents' rewards. A goal is 1 for every agent regardless.
        batch: see :class:`~torchrl_marl.envs.base.BatchOptions`. Each environment has a separate engine of 60 MiB in
            this process.

    Returns:
        The environments, with batch size ``[num_envs]``.

    Raises:
        ImportError: if the game is not installed. ``docs/environments.md`` has the commands to build it from source.
        ValueError: if an argument is out of its range or the scenario is unknown.
    """
    import_extra("gfootball", "football")
    scenarios = import_extra("gfootball.env.scenario_builder", "football").all_scenarios()
    if scenario not in scenarios:
        raise ValueError(f"gfootball has no scenario {scenario!r}; it has {', '.join(sorted(scenarios))}")
    if not 1 <= num_agents <= 11:
        raise ValueError(f"num_agents must be in 1..11, got {num_agents}")
    logging.getLogger("absl").setLevel(logging.WARNING)  # the package logs every episode
    make = lambda _: _FootballGame(scenario, num_agents, checkpoints)  # noqa: E731
    return SerialGymEnv(make, max_steps=max_steps, shared_reward=shared_reward, **batch)
