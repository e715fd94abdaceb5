"""LDSA: QMIX for agents that choose one of a few learnt subtasks at every step."""

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
    """Dynamic subtask assignment: QMIX, subtasks that differ, and agents that keep to theirs.

        loss = loss_value - distance_coeff mean_{i != j} |x_i - x_j|^2 + switching_coeff mean KL(p_t || p_{t+1})

    with representations ``x`` of subtasks and each agent's probabilities ``p`` of choosing them. Neither regulariser
    pulls at both sides: ``x_j`` and ``p_t`` count as constants, as in the authors' code. Subtasks are drawn anew when
    sequences are replayed.

    Reference: Yang et al., LDSA: Learning Dynamic Subtask Assignment in Cooperative Multi-Agent Reinforcement Learning,
    2022, https://arxiv.org/abs/2205.02561.

    Keys, shapes, outputs and errors: :class:`~torchrl_marl.objectives.value.ValueLoss`.

    Args:
        local_value_network: of :func:`~torchrl_marl.modules.make_ldsa_actor`.
        group_spec: the group that it acts for.
        mixing_embed_dim: width of the mixer.
        distance_coeff: weight of the distance between subtasks.
        switching_coeff: weight of changes of the assignment.
        **options: :class:`~torchrl_marl.objectives.value.ValueOptions`.

    Raises:
        ValueError: if the network has no subtasks, or a coefficient is below 0.
    """

    terms = ("loss_distance", "loss_switching")
    deterministic_sampling_mode: Any = ExplorationType.RANDOM  # subtasks are drawn in training

    def __init__(
        self,
        local_value_network: TensorDictModuleBase,
        group_spec: GroupSpec,
        *,
        mixing_embed_dim: int = 32,
        distance_coeff: float = 1e-3,
        switching_coeff: float = 1e-3,
        **options: Unpack[ValueOptions],
    ) -> None:
        if not any(isinstance(module, SubtaskHead) for module in local_value_network.modules()):
            raise ValueError("LDSALoss needs agents that choose subtasks: actor=torchrl_marl.modules.make_ldsa_actor.")
        check_at_least_0(distance_coeff=distance_coeff, switching_coeff=switching_coeff)
        mixer = qmix_mixer(group_spec, mixing_embed_dim)
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
    """Mean squared distance of the representations ``[K, E]`` of two different subtasks; one of them has no gradient.

    Example:
        >>> import torch
        >>> subtask_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor(25.)
    """
    pairs = len(subtasks) * (len(subtasks) - 1)
    return (subtasks.unsqueeze(1) - subtasks.detach()).square().sum() / pairs


def subtask_switching(logits: Tensor, is_init: Tensor) -> Tensor:
    """Mean divergence of each agent's choice of subtasks from the one of the step before, ``KL(p_t || p_{t+1})``.

    Args:
        logits: of the choices, ``[*B, T, N, K]``; the earlier step's have no gradient.
        is_init: whether a step is the first of its episode, ``[*B, T, 1]``, and has none before it.
    """
    log_probs = logits.log_softmax(-1)
    before, after = log_probs[..., :-1, :, :].detach(), log_probs[..., 1:, :, :]
    divergence = (before.exp() * (before - after)).sum(-1)
    return masked_mean(divergence, ~is_init[..., 1:, :].expand_as(divergence))
