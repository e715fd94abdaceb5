"""Games written in Torch as TorchRL environments."""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from torchrl_marl.envs.games.rules import Rules
from torchrl_marl.envs.games.streams import random_streams

__all__ = ["TensorEnv"]


class TensorEnv(EnvBase):
    """A batch of environments that play by :class:`~torchrl_marl.envs.games.rules.Rules`.

    The keys are those of ``make_env``'s environments: observations, actions, rewards and ``episode_reward`` of the
    group ``"agents"``, done flags and ``step_count`` at the root. The time limit and the sums are kept here, so that
    no transform is needed.

    The environment owns its randomness: ``set_seed`` gives each copy a stream of its own, nothing else in the process
    draws from it, and ``state_dict`` holds it. An environment restored from ``state_dict`` begins the same episodes at
    its next ``reset``. (A ``TransformedEnv`` leaves it out of its own ``state_dict``: use that of its ``base_env``.)

    Args:
        rules: the game.
        action_spec: of one environment, ``[N]`` for discrete or ``[N, A]`` for continuous actions.
        num_envs: number of environments stepped together.
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
        seed: int | None,
        device: torch.device | str,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.rules = rules.to(self.device)
        self.group_map = {"agents": [f"agent_{index}" for index in range(rules.num_agents)]}
        self._set_seed(seed)
        self.observation_spec = _spec_of(rules.describe(self.state))
        self.action_spec = self._of_agents("action", action_spec.expand(torch.Size([num_envs, *action_spec.shape])))
        self.reward_spec = self._of_agents("reward", Unbounded(torch.Size([num_envs, rules.num_agents, 1])))
        flag = Categorical(2, shape=torch.Size([num_envs, 1]), dtype=torch.bool)
        flags = {"done": flag, "terminated": flag.clone(), "truncated": flag.clone()}
        self.done_spec = Composite(flags, shape=self.batch_size).to(self.device)

    def _of_agents(self, name: str, spec: TensorSpec) -> Composite:
        group = Composite({name: spec}, shape=(*self.batch_size, self.rules.num_agents))
        return Composite(agents=group, shape=self.batch_size).to(self.device)

    def _set_seed(self, seed: int | None) -> None:
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        self.set_extra_state(random_streams(seed, self.batch_size[0], device=self.device))

    def get_extra_state(self) -> Tensor:
        """Return every environment's stream, ``[num_envs]``: the part of ``state_dict`` that is not a parameter."""
        return self.state["random"]

    def set_extra_state(self, state: Tensor) -> None:
        """Continue every environment's stream from ``state``, ``[num_envs]``, at the next ``reset``.

        Raises:
            ValueError: if there is not one stream for each environment.
        """
        if state.shape != self.batch_size:
            raise ValueError(f"streams must be of shape {list(self.batch_size)}, got {list(state.shape)}")
        random = state.to(self.device)
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

    def render(self, env_index: int = 0) -> Tensor:
        """Draw one of the environments.

        Args:
            env_index: which one.

        Returns:
            Picture, ``uint8`` of shape ``[height, width, 3]``.

        Raises:
            ImportError: if Pillow is not installed.
            ValueError: if there is no such environment.
        """
        if not 0 <= env_index < self.batch_size[0]:
            raise ValueError(f"env_index must be in 0..{self.batch_size[0] - 1}, got {env_index}")
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError as error:
            raise ImportError('drawing needs Pillow: pip install "torchrl_marl[plot]"') from error
        return torch.from_numpy(np.array(self.rules.draw(dict(self.state[env_index].cpu().items()))))


def _spec_of(data: TensorDictBase) -> Composite:
    specs = {
        key: _spec_of(value) if isinstance(value, TensorDictBase) else _leaf_spec(value) for key, value in data.items()
    }
    return Composite(specs, shape=data.batch_size, device=data.device)


def _leaf_spec(value: Tensor) -> TensorSpec:
    if value.dtype == torch.bool:
        return Categorical(2, shape=value.shape, dtype=torch.bool, device=value.device)
    return Unbounded(value.shape, dtype=value.dtype, device=value.device)
