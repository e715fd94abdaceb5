"""Games written in Torch as TorchRL environments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from torchrl_marl.envs.base import BatchOptions, TeamEnv, spec_of
from torchrl_marl.envs.games.rules import Rules
from torchrl_marl.extras import import_extra

__all__ = ["GameEnv", "TensorEnv"]


class TensorEnv(TeamEnv):
    """A batch of environments that follow :class:`~torchrl_marl.envs.games.rules.Rules`.

    Args:
        rules: the game.
        num_envs: number of environments stepped together, ``B``.
        seed: seed of the streams; ``None`` draws a seed from Torch's global generator.
        device: device of the environment.

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
        self, rules: Rules, *, num_envs: int, seed: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        agents = [f"agent_{index}" for index in range(rules.num_agents)]
        super().__init__(agents, rules.action_spec, num_envs=num_envs, max_steps=rules.max_steps, device=device)
        self.rules = rules.to(self.device)
        self.limit_flag, self.fixed_length = f"{rules.time_limit}d", rules.fixed_length
        self._set_seed(seed)
        self.observation_spec = spec_of(rules.describe(self.state))

    @property
    def streams(self) -> Tensor:
        """The random stream of every copy, a part of the state."""
        return self.state["random"]

    @streams.setter
    def streams(self, streams: Tensor) -> None:
        random = streams.to(self.device)
        self.state = self.rules.reset(random).set("random", random)

    def _reset(self, tensordict: TensorDictBase | None) -> TensorDict:
        where = None if tensordict is None else tensordict.get("_reset", None)
        random = self.state["random"]
        self.state = self.rules.reset(random) if where is None else self.rules.restart(self.state, where.squeeze(-1))
        return self.rules.describe(self.state)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        self.state, data = self.rules.step(self.state, tensordict["agents", "action"])
        return data

    def _draw(self, env_index: int) -> np.ndarray:
        import_extra("PIL.Image", "plot")
        return self.rules.draw(dict(self.state[env_index].cpu().items()))


class GameEnv(TensorEnv):
    """A game whose arguments are the fields of its rules, and ``num_envs``, ``seed`` and ``device``.

    The rules alone define a game's settings and defaults; ``inspect.signature`` shows them. A subclass names its rules
    in ``rules_type``.

    Example:
        >>> from torchrl_marl.envs import MazeEnv
        >>> list(inspect.signature(MazeEnv).parameters)
        ['maze', 'max_steps', 'time_limit', 'step_cost', 'num_envs', 'seed', 'device']
    """

    rules_type: ClassVar[Callable[..., Rules]]

    def __init__(self, *settings: Any, **options: Any) -> None:
        batch = {name: options.pop(name) for name in BatchOptions.__annotations__ if name in options}
        super().__init__(self.rules_type(*settings, **options), **batch)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _, _, *batch = inspect.signature(TensorEnv.__init__).parameters.values()  # without self and rules
        shown = [*inspect.signature(cls.rules_type).parameters.values(), *batch]
        stated = [TensorEnv.__init__, *reversed(cls.rules_type.__mro__)]  # 3.10's get_type_hints rejects KW_ONLY
        kinds = {name: kind for one in stated for name, kind in inspect.get_annotations(one, eval_str=True).items()}
        cls.__signature__ = inspect.Signature([each.replace(annotation=kinds[each.name]) for each in shown])
