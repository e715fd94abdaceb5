"""LDSA: QMIX with agents that select one of several learned subtasks at every step."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import ExplorationType
from typing_extensions import Unpack

from torchrl_marl.modules import GroupSpec
from torchrl_marl.modules.subtasks import SubtaskHead
from torchrl_marl.objectives.masking import masked_mean
from torchrl_marl.objectives.ratio import check_at_least_0
from torchrl_marl.objectives.value.decomposition import qmix_mixer
from torchrl_marl.objectives.value.value_loss import ValueLoss, ValueOptions

__all__ = ["LDSALoss", "subtask_distance", "subtask_switching"]


class LDSALoss(ValueLoss):
    """Dynamic subtask assignment: QMIX with regularisers for distinct subtasks and a stable assignment.

        loss = loss_value - distance_coeff mean_{i != j} |x_i - x_j|^2 + switching_coeff mean KL(p_t || p_{t+1})

    with subtask representations ``x`` and each agent's selection probabilities ``p``. As in the authors' code, ``x_j``
    and ``p_t`` receive no gradient. Replayed sequences sample new subtasks.

    Reference: Yang et al., LDSA: Learning Dynamic Subtask Assignment in Cooperative Multi-Agent Reinforcement Learning,
    2022, https://arxiv.org/abs/2205.02561.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.value.ValueLoss`.

    Args:
        local_value_network: actor of :func:`~torchrl_marl.modules.make_ldsa_actor`.
        group_spec: group of the agents.
        mixing_embed_dim: width of the mixer's hidden layer.
        mixer_init_scale: see :class:`~torchrl_marl.objectives.QMIXLoss`.
        distance_coeff: weight of the distance between subtask representations.
        switching_coeff: weight of the divergence between consecutive selection probabilities.
        **options: :class:`~torchrl_marl.objectives.value.ValueOptions`.

    Raises:
        ValueError: if the network has no subtasks, or a coefficient is negative.
    """

    terms = ("loss_distance", "loss_switching")
    deterministic_sampling_mode: Any = ExplorationType.RANDOM  # sample subtasks in training

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        group_spec: GroupSpec,
        *,
        mixing_embed_dim: int = 32,
        mixer_init_scale: float = 0.01,
        distance_coeff: float = 1e-3,
        switching_coeff: float = 1e-3,
        **options: Unpack[ValueOptions],
    ) -> None:
        if not any(isinstance(module, SubtaskHead) for module in local_value_network.modules()):
            raise ValueError("LDSALoss needs agents that choose subtasks: actor=torchrl_marl.modules.make_ldsa_actor.")
        check_at_least_0(distance_coeff=distance_coeff, switching_coeff=switching_coeff)
        mixer = qmix_mixer(group_spec, mixing_embed_dim, mixer_init_scale)
        super().__init__(local_value_network, mixer, group_spec, **options)
        self.distance_coeff, self.switching_coeff = distance_coeff, switching_coeff

    def _regularizers(self, online: TensorDictBase) -> dict[str, Tensor]:
        with self._parameters_of("local_value_network", target=False):
            heads = (module for module in self.local_value_network.modules() if isinstance(module, SubtaskHead))
            subtasks = next(heads).subtasks()
        logits = online[self.group_spec.name, "subtask_logits"]
        return {
            "loss_distance": -self.distance_coeff * subtask_distance(subtasks),
            "loss_switching": self.switching_coeff * subtask_switching(logits, online["is_init"]),
        }


def subtask_distance(subtasks: Tensor) -> Tensor:
    """Mean squared distance between representations ``[K, E]`` of two subtasks; the second receives no gradient.

    Example:
        >>> import torch
        >>> subtask_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor(25.)
    """
    pairs = len(subtasks) * (len(subtasks) - 1)
    return (subtasks.unsqueeze(1) - subtasks.detach()).square().sum() / pairs


def subtask_switching(logits: Tensor, is_init: Tensor) -> Tensor:
    """Mean divergence between the selection probabilities of consecutive steps, ``KL(p_t || p_{t+1})``.

    Args:
        logits: selection logits, ``[*B, T, N, K]``; those of the earlier step receive no gradient.
        is_init: whether a step is the first of its episode, ``[*B, T, 1]``.
    """
    log_probs = logits.log_softmax(-1)
    before, after = log_probs[..., :-1, :, :].detach(), log_probs[..., 1:, :, :]
    divergence = (before.exp() * (before - after)).sum(-1)
    return masked_mean(divergence, ~is_init[..., 1:, :].expand_as(divergence))
