"""VDN, QMIX and QPLEX: one Q-learning loss with three mixers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.modules import QMixer, VDNMixer
from typing_extensions import Unpack

from torchrl_marl.modules import GroupSpec
from torchrl_marl.modules.mixers import QPLEXMixer
from torchrl_marl.objectives.value.value_loss import ValueLoss, ValueOptions, mixer_state

__all__ = ["QMIXLoss", "QPLEXLoss", "VDNLoss", "qmix_mixer"]


class VDNLoss(ValueLoss):
    """Value decomposition networks: the team value is the sum of the agents' values.

        Q_tot(a) = sum_i Q_i(o_i, a_i)

    Reference: Sunehag et al., Value-Decomposition Networks For Cooperative Multi-Agent Learning, 2017,
    https://arxiv.org/abs/1706.05296. The mixer is TorchRL's ``VDNMixer``.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.value.ValueLoss`.

    Args:
        local_value_network: network of the agents' action values.
        group_spec: group of the agents.
        **options: :class:`~torchrl_marl.objectives.value.ValueOptions`.

    Example:
        >>> loss = VDNLoss(make_actor(spec), spec)  # doctest: +SKIP
        >>> loss(transitions)["loss_value"].backward()  # doctest: +SKIP
    """

    def __init__(
        self, local_value_network: TensorDictModuleBase, group_spec: GroupSpec, **options: Unpack[ValueOptions]
    ) -> None:
        mixer = VDNMixer(group_spec.num_agents, device="cpu")
        network = TensorDictModule(
            mixer, in_keys=[(group_spec.name, "chosen_action_value")], out_keys=["chosen_action_value"]
        )
        super().__init__(local_value_network, network, group_spec, **options)


class QMIXLoss(ValueLoss):
    """QMIX: the team value is monotonic in each agent's value; the mixing weights depend on the state.

        Q_tot(s, a) = |W_2(s)|^T elu(|W_1(s)|^T [Q_1, ..., Q_N] + b_1(s)) + V(s)

    Reference: Rashid et al., QMIX: Monotonic Value Function Factorisation for Deep Multi-Agent Reinforcement Learning,
    2018, https://arxiv.org/abs/1803.11485. The mixer is TorchRL's ``QMixer``.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.value.ValueLoss`.

    Args:
        local_value_network: network of the agents' action values.
        group_spec: group of the agents.
        mixing_embed_dim: width of the mixer's hidden layer.
        mixer_init_scale: factor of Torch's initial parameters of the mixer. At 1, states whose entries are far above 1,
            such as SMAX's, start with team values tens of times as large as the returns, and little is learnt.
        **options: :class:`~torchrl_marl.objectives.value.ValueOptions`.
    """

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        group_spec: GroupSpec,
        *,
        mixing_embed_dim: int = 32,
        mixer_init_scale: float = 0.01,
        **options: Unpack[ValueOptions],
    ) -> None:
        mixer = qmix_mixer(group_spec, mixing_embed_dim, mixer_init_scale)
        super().__init__(local_value_network, mixer, group_spec, **options)


class QPLEXLoss(ValueLoss):
    """QPLEX: duplex dueling represents every team value whose greedy joint action consists of the greedy actions.

    See :class:`~torchrl_marl.modules.QPLEXMixer` for the equations.

    Reference: Wang et al., QPLEX: Duplex Dueling Multi-Agent Q-Learning, 2021, https://arxiv.org/abs/2008.01062.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.value.ValueLoss`.

    Args:
        local_value_network: network of the agents' action values.
        group_spec: group of the agents.
        mixing_embed_dim: width of the networks that compute the weights and biases of the agents' values.
        num_heads: number of attention heads of the importance weights.
        attention_sizes: widths of the hidden layers of the attention networks.
        **options: :class:`~torchrl_marl.objectives.value.ValueOptions`.
    """

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        group_spec: GroupSpec,
        *,
        mixing_embed_dim: int = 64,
        num_heads: int = 4,
        attention_sizes: Sequence[int] = (),
        **options: Unpack[ValueOptions],
    ) -> None:
        key, shape = mixer_state(group_spec)
        mixer = QPLEXMixer(
            group_spec.num_agents,
            group_spec.num_actions or 0,
            math.prod(shape),
            embed_dim=mixing_embed_dim,
            num_heads=num_heads,
            attention_sizes=attention_sizes,
        )
        mixed = [(group_spec.name, name) for name in ("chosen_action_value", "greedy_action_value", "action")]
        network = TensorDictModule(mixer, in_keys=[*mixed, key], out_keys=["chosen_action_value"])
        super().__init__(local_value_network, network, group_spec, **options)


def qmix_mixer(spec: GroupSpec, mixing_embed_dim: int, init_scale: float) -> TensorDictModule:
    """Return TorchRL's ``QMixer`` for a group; see :class:`QMIXLoss`."""
    if not init_scale > 0:
        raise ValueError(f"mixer_init_scale must be above 0, got {init_scale}.")
    key, shape = mixer_state(spec)
    mixer = QMixer(torch.Size(shape), mixing_embed_dim, spec.num_agents, device="cpu")
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.mul_(init_scale)
    mixed = (spec.name, "chosen_action_value")
    return TensorDictModule(mixer, in_keys=[mixed, key], out_keys=["chosen_action_value"])
