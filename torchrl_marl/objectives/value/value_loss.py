"""The base of value-based methods: Q-learning of a team's value that a mixer makes of the agents' own."""

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
    """Q-learning with a decomposed team value; abstract: a method chooses the mixer.

        Q_tot(s, a) = mixer(Q_1(o_1, a_1), ..., Q_N(o_N, a_N); s)
        y = r + gamma (1 - terminated) Q_tot'(s', a'),   a'_i = argmax_b Q_i(o'_i, b)
        loss_value = mean(distance(Q_tot(s, a), y))

    ``Q_tot'`` are the target networks, which TorchRL's ``SoftUpdate(loss, tau=...)`` or ``HardUpdate`` moves; the
    greedy next action is the online networks' (double Q-learning), or with ``double_dqn=False`` the target networks'.

    * The team's reward ``r`` is the mean over agents of ``[*B, N, 1]``, or the team's own ``[*B, 1]``.
    * A truncated episode is bootstrapped from its last observation, a terminated one is not.
    * Illegal actions (``action_mask``) are never greedy.
    * A dead agent (``mask``) adds 0 in the place of its value, now and in the next step, and learns nothing.
    * Rows that TorchRL's ``loss_mask_key`` leaves out, such as padding, take part in nothing.
    * Recurrent networks learn from sequences ``[*B, T]``: they are unrolled from the state stored with the first row
      and start anew at ``"is_init"``; with sequences of whole episodes that is PyMARL's zero state. The target networks
      are unrolled in the same way, and both go one step on from each row's state to value what was observed next.

    It is a base of its own, as :class:`torchrl.objectives.QMixerLoss` (0.14.1) has no double Q-learning, knows neither
    live agents nor action masks nor padding, values next observations of a recurrent network with the memory of the
    step before, passes its mixer nothing but chosen values and a state, where QPLEX needs more, and writes into its
    input. The mixers of TorchRL are used.

    Keys (see :mod:`torchrl_marl.keys`), all renamable with ``set_keys``; the group is that of ``group_spec``.

    Args:
        local_value_network: writes each agent's ``action_value``, ``[*B, N, A]``. Of a policy, as
            :func:`~torchrl_marl.modules.make_actor` builds it, the logits are the action values, so that its most
            likely action is the greedy one.
        mixer_network: reads ``(group, "chosen_action_value")`` and, if it likes, ``(group, "greedy_action_value")``,
            ``[*B, N, 1]`` both, ``(group, "action")`` and a state; writes ``"chosen_action_value"``, ``[*B, 1]``.
        group_spec: the group that the mixer is made for.
        double_dqn: see above.
        loss_function: ``"l2"``, ``"l1"`` or ``"smooth_l1"``.

    Raises:
        TypeError: if there is no network.
        ValueError: if actions are continuous, or in ``forward``, if the data are of other agents than the mixer.
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
    terms: tuple[str, ...] = ()  # that a method adds to the loss
    takes_steps = trains_in_parts = False  # every update is an optimiser's, of all parameters
    learns_sequences = False  # that is, from their first step alone

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
            local_value_network = local_value_network[:-1]  # of a policy, what it makes its distribution of
        device = next((parameter.device for parameter in local_value_network.parameters()), None)
        self.convert_to_functional(cast("Any", local_value_network), "local_value_network", create_target_params=True)
        self.convert_to_functional(mixer_network.to(device), "mixer_network", create_target_params=True)
        self.group_spec, self.double_dqn, self.loss_function = group_spec, double_dqn, loss_function
        name = group_spec.name
        written = {key[-1]: key for key in local_value_network.out_keys if isinstance(key, tuple)}
        self.set_keys(
            action_value=written.get("action_value", written.get("logits", (name, "action_value"))),
            **{key: (name, key) for key in ("action", "action_mask", "mask", "reward")},
        )

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads; ``data.select(*loss.in_keys, strict=False)`` keeps just these."""
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
        """Entries that the network carries from step to step."""
        network = self.local_value_network
        return [key for key in network.in_keys if _next(key) in network.out_keys]

    @property
    def _mixed_keys(self) -> list[NestedKey]:
        """What the mixer reads of agents: values of chosen and of greedy actions, and the chosen actions."""
        return [(self.group_spec.name, key) for key in ("chosen_action_value", "greedy_action_value", "action")]

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are scaled down to one norm together, by the name under which it is logged."""
        return {"grad_norm": list(self.parameters())}

    def make_value_estimator(self, value_type: ValueEstimators | None = None, **hyperparams: Any) -> ValueLoss:
        """Choose the targets: one step (``TD0``, the default, with gamma 0.99) or, on sequences, ``TDLambda``."""
        supported = (ValueEstimators.TD0, ValueEstimators.TDLambda)
        kind = value_type or self.default_value_estimator
        dispatch_value_estimator(self, kind, supported=supported, value_network=None, **hyperparams)
        return self

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        """The estimator sees rewards under names of its own."""

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the loss and detached diagnostics.

        Args:
            tensordict: transitions ``[B]`` or, for recurrent networks, sequences of them ``[*B, T]``; not changed.

        Returns:
            A TensorDict with ``loss_value``, ``td_error`` (mean distance to the target), ``pred_value`` and
            ``target_value`` (means).
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
        """Further ``loss_*`` terms, of what the online network has written; the hook of methods that add some."""
        return {}

    def _parameters_of(self, name: str, *, target: bool) -> AbstractContextManager:
        params = getattr(self, f"target_{name}_params" if target else f"{name}_params")
        return params.to_module(
            getattr(self, name), preserve_module_state=False
        )  # else targets would become parameters

    def _evaluate(self, tensordict: TensorDictBase, *, target: bool) -> TensorDictBase:
        """Copy the data, with what the network writes: action values and states after each step."""
        data = tensordict.copy()
        with self._parameters_of("local_value_network", target=target):
            self.local_value_network(data)
        return data

    def _evaluate_next(self, tensordict: TensorDictBase, *, target: bool) -> TensorDictBase:
        """The same of what is observed next, one step on from the states after each row's step."""
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
        """The action of highest value among the legal ones of each agent, ``[*B, N]``."""
        values: Tensor = data.get(self.tensor_keys.action_value)
        legal = data.get(self.tensor_keys.action_mask, None)
        values = values if legal is None else torch.where(legal, values, torch.finfo(values.dtype).min)
        return values.argmax(-1)

    def _mix(self, data: TensorDictBase, action: Tensor, *, target: bool) -> Tensor:
        """The team's value of joint actions, ``[*B, 1]``; it writes into ``data``."""
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
            action = torch.where(live.squeeze(-1), action, 0)  # it enters QPLEX's importance weights
        data.update(dict(zip(self._mixed_keys, (chosen, greedy, action), strict=True)))
        with self._parameters_of("mixer_network", target=target):
            return self.mixer_network(data)["chosen_action_value"]

    def _valid_keys(self) -> list[NestedKey]:
        named = self.loss_mask_key
        return [] if named is None else list(AUTO_LOSS_MASK_KEYS) if named == "auto" else [named]

    def _valid(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor | None:
        """Rows that are data and no padding, ``[*B]``; ``None``: all."""
        found = {key: tensordict.get(key, None) for key in self._valid_keys()}
        masks = [expand_mask(mask, shape, shape, key) for key, mask in found.items() if mask is not None]
        return torch.stack(masks).all(0) if masks else None


def mixer_state(spec: GroupSpec) -> tuple[NestedKey, tuple[int, ...]]:
    """Key and shape of what a mixer sees: the root's ``"state"``, or where there is none all agents' observations."""
    if spec.state_size is None:
        return (spec.name, "observation"), (spec.num_agents, spec.observation_size)
    return "state", (spec.state_size,)


def _next(key: NestedKey) -> NestedKey:
    return ("next", *((key,) if isinstance(key, str) else key))
