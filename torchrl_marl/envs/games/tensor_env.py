"""Games written in Torch as TorchRL environments."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

from torchrl_marl.envs.base import BatchOptions, TeamEnv, spec_of
from torchrl_marl.envs.games.rules import Rules, TimeLimit
from torchrl_marl.extras import import_extra

__all__ = ["GameOptions", "TensorEnv"]


class GameOptions(BatchOptions, total=False):
    """Options of every game: besides those of a batch, the time limit in steps, and how it is reported.

    ``max_steps`` has a default in each game. ``time_limit="truncate"`` sets ``truncated``, and advantage estimation
    bootstraps from the last state; ``"terminate"`` sets ``terminated``.
    """

    max_steps: int
    time_limit: TimeLimit


class TensorEnv(TeamEnv):
    """A batch of environments that follow :class:`~torchrl_marl.envs.games.rules.Rules`.

    Args:
        rules: the game.
        action_spec: of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        num_envs: number of environments stepped together, ``B``.
        seed: of the streams; ``None`` draws one from Torch's global generator.
        device: where to play.

    Raises:
        ValueError: if ``num_envs`` is below 1.

    Example:
        >>> from torchrl_marl.envs import CoordSumEnv
        >>> env, restored = CoordSumEnv(num_envs=2, seed=0), CoordSumEnv(num_envs=2)
        >>> restored.load_state_dict(env.state_dict())
        <All keys matched successfully>
        >>> torch.equal(env.reset()["state"], restored.reset()["state"])
        True
    """

    def __init__(
        self,
        rules: Rules,
        *,
        action_spec: TensorSpec,
        num_envs: int,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        agents = [f"agent_{index}" for index in range(rules.num_agents)]
        super().__init__(agents, action_spec, num_envs=num_envs, max_steps=rules.max_steps, device=device)
        self.rules = rules.to(self.device)
        self.limit_flag, self.fixed_length = f"{rules.time_limit}d", rules.fixed_length
        self._set_seed(seed)
        self.observation_spec = spec_of(rules.describe(self.state))

    @property
    def streams(self) -> Tensor:
        """Every copy's random stream, a part of its state."""
        return self.state["random"]

    @streams.setter
    def streams(self, streams: Tensor) -> None:
        random = streams.to(self.device)
        self.state = self.rules.reset(random).set("random", random)

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        where = None if tensordict is None else tensordict.get("_reset", None)
        if where is None:
            self.state = self.rules.reset(self.state["random"])
        else:
            self.state = self.rules.restart(self.state, where.squeeze(-1))
        return self.rules.describe(self.state)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.state, data = self.rules.step(self.state, tensordict["agents", "action"])
        return data

    def _draw(self, env_index: int) -> np.ndarray:
        import_extra("PIL.Image", "plot")
        return np.array(self.rules.draw(dict(self.state[env_index].cpu().items())))
