"""Base of the value-based losses: Q-learning of a team value that a mixer computes from the agents' values."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    dispatch,
)
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import LossModule, ValueEstimators, distance_loss
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.utils import dispatch_value_estimator

from torchrl_marl.modules import GroupSpec
from torchrl_marl.objectives.masking import expand_mask, masked_mean

__all__ = ["ValueLoss", "ValueOptions", "mixer_state"]


class ValueOptions(TypedDict, total=False):
    """Options of every value-based loss; meanings and defaults are those of :class:`ValueLoss`."""

    double_dqn: bool
    loss_function: Literal["l2", "l1", "smooth_l1"]


class ValueLoss(LossModule):
    """Abstract base of Q-learning with a decomposed team value; subclasses choose the mixer.

        Q_tot(s, a) = mixer(Q_1(o_1, a_1), ..., Q_N(o_N, a_N); s)
        y = r + gamma (1 - terminated) Q_tot'(s', a'),   a'_i = argmax_b Q_i(o'_i, b)
        loss_value = mean(distance(Q_tot(s, a), y))

    ``Q_tot'`` is computed by the target networks, which TorchRL's ``SoftUpdate(loss, tau=...)`` or ``HardUpdate``
    updates. The online networks choose the greedy next action (double Q-learning); with ``double_dqn=False`` the target
    networks do.

    * The team reward ``r`` is the mean over agents of rewards ``[*B, N, 1]``, or a common reward ``[*B, 1]``.
    * Truncated episodes bootstrap from their last observation, terminated episodes do not.
    * The greedy action is chosen among legal actions (``action_mask``).
    * A dead agent (``mask``) contributes a value of 0 to the mixer, in the current and in the next step, and receives
      no gradient.
    * Rows excluded by TorchRL's ``loss_mask_key``, such as padding, do not enter the loss or its diagnostics.
    * Recurrent networks are trained on sequences ``[*B, T]``, unrolled from the state stored with the first row and
      reset at ``"is_init"``. For sequences of whole episodes, this is PyMARL's zero initial state. The target networks
      are unrolled likewise. Next observations are evaluated with the state after each row.

    The class does not build on :class:`torchrl.objectives.QMixerLoss` (0.14.1), which supports neither double
    Q-learning, live-agent and action masks nor padding, evaluates next observations of a recurrent network with the
    state of the previous step, passes only chosen values and a state to its mixer (QPLEX needs more), and modifies its
    input. The mixers are TorchRL's where it has them.

    All keys (see :mod:`torchrl_marl.keys`) can be renamed with ``set_keys``; their group is that of ``group_spec``.

    Args:
        local_value_network: network that writes the ``action_value`` of each agent, ``[*B, N, A]``. The logits of a
            policy from :func:`~torchrl_marl.modules.make_actor` serve as action values, so that the policy's mode is
            the greedy action.
        mixer_network: mixer that reads ``(group, "chosen_action_value")`` and optionally
            ``(group, "greedy_action_value")``, both ``[*B, N, 1]``, ``(group, "action")`` and a state; it writes
            ``"chosen_action_value"``, ``[*B, 1]``.
        group_spec: group that the mixer is built for.
        double_dqn: whether the online networks choose the next action.
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.

    Raises:
        TypeError: if ``local_value_network`` is not a TensorDict module.
        ValueError: if actions are continuous; in ``forward``, if the numbers of agents or actions in the data differ
            from those of the mixer.
    """

    @dataclass
    class _AcceptedKeys:
        action_value: NestedKey = ("agents", "action_value")
        action: NestedKey = ("agents", "action")
        action_mask: NestedKey = ("agents", "action_mask")
        mask: NestedKey = ("agents", "mask")
        reward: NestedKey = ("agents", "reward")
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.TD0
    terms: tuple[str, ...] = ()  # further loss_* entries of a subclass
    takes_steps = trains_in_parts = moves_buffers = False  # each update is one optimiser step on all parameters
    learns_sequences = False  # sequences need not start with an episode

    local_value_network: TensorDictModuleBase
    local_value_network_params: TensorDictParams
    target_local_value_network_params: TensorDictParams
    mixer_network: TensorDictModule
    mixer_network_params: TensorDictParams
    target_mixer_network_params: TensorDictParams

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        mixer_network: TensorDictModule,
        group_spec: GroupSpec,
        *,
        double_dqn: bool = True,
        loss_function: Literal["l2", "l1", "smooth_l1"] = "l2",
    ) -> None:
        if type(self) is ValueLoss:
            raise TypeError("ValueLoss is abstract: use VDNLoss, QMIXLoss, QPLEXLoss, LDSALoss or a subclass.")
        if not isinstance(local_value_network, TensorDictModuleBase):  # MAT's actor and critic, for example
            raise TypeError(f"{type(self).__name__} needs agents that act by themselves: actor=mlp or actor=gru.")
        if group_spec.num_actions is None:
            raise ValueError(
                f"{type(self).__name__} needs discrete actions, but {group_spec.name!r} has continuous ones; in VMAS "
                "choose env.continuous_actions=false."
            )
        if loss_function not in ("l2", "l1", "smooth_l1"):
            raise ValueError(f"loss_function must be one of l2, l1, smooth_l1; got {loss_function!r}.")
        super().__init__()
        if isinstance(local_value_network, ProbabilisticTensorDictSequential):
            local_value_network = local_value_network[:-1]  # a policy without its distribution
        device = next((parameter.device for parameter in local_value_network.parameters()), None)
        self.convert_to_functional(cast("Any", local_value_network), "local_value_network", create_target_params=True)
        self.convert_to_functional(mixer_network.to(device), "mixer_network", create_target_params=True)
        for name, buffer in (buffers := dict(self.named_buffers())).items():
            # targets share the running statistics of observations, since updaters move parameters alone
            buffers.get(f"target_{name}", buffer).set_(buffer)  # pyright: ignore[reportArgumentType]
        self.group_spec, self.double_dqn, self.loss_function = group_spec, double_dqn, loss_function
        name = group_spec.name
        written = {key[-1]: key for key in local_value_network.out_keys if isinstance(key, tuple)}
        self.set_keys(
            action_value=written.get("action_value", written.get("logits", (name, "action_value"))),
            **{key: (name, key) for key in ("action", "action_mask", "mask", "reward")},
        )

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads, for ``data.select(*loss.in_keys, strict=False)``."""
        keys = self.tensor_keys
        network, states = self.local_value_network.in_keys, self.recurrent_state_keys
        again = [key for key in network if key not in (*states, "is_init")]
        again += [key for key in self.mixer_network.in_keys if key not in self._mixed_keys]
        again += [keys.action_mask, keys.mask]
        observed_next = [*again, keys.reward, keys.done, keys.terminated]
        found = [*network, *again, keys.action, *(_next(key) for key in observed_next), *self._valid_keys()]
        return list(dict.fromkeys(found))

    @property
    def out_keys(self) -> list[str]:
        """Entries that ``forward`` returns."""
        return ["loss_value", *self.terms, "td_error", "pred_value", "target_value"]

    @property
    def recurrent_state_keys(self) -> list[NestedKey]:
        """Recurrent states of the network."""
        network = self.local_value_network
        return [key for key in network.in_keys if _next(key) in network.out_keys]

    @property
    def _mixed_keys(self) -> list[NestedKey]:
        """Inputs of the mixer: values of chosen and of greedy actions, and the chosen actions."""
        return [(self.group_spec.name, key) for key in ("chosen_action_value", "greedy_action_value", "action")]

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Groups of parameters whose gradients are clipped to one joint norm, by the logged name of the norm."""
        return {"grad_norm": list(self.parameters())}

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: Any) -> ValueLoss:
        """Set the targets: one-step (``TD0``, the default, with gamma 0.99) or, on sequences, ``TDLambda``."""
        supported = (ValueEstimators.TD0, ValueEstimators.TDLambda)
        kind = value_type or self.default_value_estimator
        dispatch_value_estimator(self, kind, supported=supported, value_network=None, **hyperparams)
        return self

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """Do nothing: ``_target`` passes rewards and flags under the estimator's default keys."""

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss and detached diagnostics.

        Args:
            tensordict: transitions ``[B]`` or, for recurrent networks, sequences ``[*B, T]``; it is not modified.

        Returns:
            TensorDict with ``loss_value``, ``td_error`` (mean absolute difference to the target), and the means
            ``pred_value`` and ``target_value``.
        """
        online = self._evaluate(tensordict, target=False)
        value = self._mix(online, tensordict[self.tensor_keys.action], target=False)
        with torch.no_grad():
            target = self._target(tensordict, online)
        valid = self._valid(tensordict, value.shape[:-1])
        distance = distance_loss(value, target, self.loss_function)
        means = {"td_error": (value - target).abs(), "pred_value": value, "target_value": target}
        measured = {name: masked_mean(entry.detach().squeeze(-1), valid) for name, entry in means.items()}
        losses = {"loss_value": masked_mean(distance.squeeze(-1), valid), **self._regularizers(online)}
        return TensorDict({**losses, **measured})

    def _regularizers(self, online: TensorDictBase) -> dict[str, Tensor]:
        """Further ``loss_*`` terms, computed from the outputs of the online network; a hook for subclasses."""
        return {}

    def _parameters_of(self, name: str, *, target: bool) -> AbstractContextManager:
        params = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        return params.to_module(
            getattr(self, name), preserve_module_state=False
        )  # otherwise, target parameters would be registered as parameters of the loss

    def _evaluate(self, tensordict: TensorDictBase, *, target: bool) -> TensorDictBase:
        """Return a copy of the data with the outputs of the network: action values and next recurrent states."""
        data = tensordict.copy()
        with self._parameters_of("local_value_network", target=target):
            self.local_value_network(data)
        return data

    def _evaluate_next(self, tensordict: TensorDictBase, *, target: bool) -> TensorDictBase:
        """Evaluate the next observations, with the recurrent state after each row."""
        with set_recurrent_mode(False):
            return self._evaluate(cast("TensorDictBase", tensordict["next"]), target=target)

    def _target(self, tensordict: TensorDictBase, online: TensorDictBase) -> Tensor:
        keys = self.tensor_keys
        remembering = self._evaluate(tensordict, target=True) if self.recurrent_state_keys else tensordict
        following = self._evaluate_next(remembering, target=True)
        action = self._greedy(self._evaluate_next(online, target=False) if self.double_dqn else following)
        next_value = self._mix(following, action, target=True)
        reward = tensordict[_next(keys.reward)]
        if reward.ndim == next_value.ndim + 1:
            reward = reward.mean(-2)
        ends = {name: tensordict[_next(getattr(keys, name))] for name in ("done", "terminated")}
        transition = TensorDict({"next": {"reward": reward, **ends}}, tensordict.batch_size)
        return self.value_estimator.value_estimate(transition, next_value=next_value)

    def _greedy(self, data: TensorDictBase) -> Tensor:
        """Legal action of highest value for each agent, ``[*B, N]``."""
        values: Tensor = data.get(self.tensor_keys.action_value)
        legal = data.get(self.tensor_keys.action_mask, None)
        values = values if legal is None else torch.where(legal, values, torch.finfo(values.dtype).min)
        return values.argmax(-1)

    def _mix(self, data: TensorDictBase, action: Tensor, *, target: bool) -> Tensor:
        """Team value of joint actions, ``[*B, 1]``; writes the mixer's inputs into ``data``."""
        key, spec, live = self.tensor_keys.action_value, self.group_spec, data.get(self.tensor_keys.mask, None)
        values = data[key]
        if values.shape[-2:] != (spec.num_agents, spec.num_actions):
            raise ValueError(
                f"{key!r} has shape {tuple(values.shape)}, but the mixer of {type(self).__name__} is made for "
                f"{spec.num_agents} agents with {spec.num_actions} actions each."
            )
        chosen, greedy = (values.gather(-1, index.unsqueeze(-1)) for index in (action, self._greedy(data)))
        if live is not None:
            live = expand_mask(live, action.shape, data.batch_size, self.tensor_keys.mask).unsqueeze(-1)
            chosen, greedy = torch.where(live, chosen, 0.0), torch.where(live, greedy, 0.0)
            action = torch.where(live.squeeze(-1), action, 0)  # an input of QPLEX's importance weights
        data.update(dict(zip(self._mixed_keys, (chosen, greedy, action), strict=True)))
        with self._parameters_of("mixer_network", target=target):
            return self.mixer_network(data)["chosen_action_value"]

    def _valid_keys(self) -> list[NestedKey]:
        named = self.loss_mask_key
        return [] if named is None else list(AUTO_LOSS_MASK_KEYS) if named == "auto" else [named]

    def _valid(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor | None:
        """Mask of the rows that are not padding, ``[*B]``; ``None`` if all rows are valid."""
        found = {key: tensordict.get(key, None) for key in self._valid_keys()}
        masks = [expand_mask(mask, shape, shape, key) for key, mask in found.items() if mask is not None]
        return torch.stack(masks).all(0) if masks else None


def mixer_state(spec: GroupSpec) -> tuple[NestedKey, tuple[int, ...]]:
    """Key and shape of a mixer's state: ``"state"`` at the root if it exists, otherwise all agents' observations."""
    if spec.state_size is None:
        return (spec.name, "observation"), (spec.num_agents, spec.observation_size)
    return "state", (spec.state_size,)


def _next(key: NestedKey) -> NestedKey:
    return ("next", *((key,) if isinstance(key, str) else key))
