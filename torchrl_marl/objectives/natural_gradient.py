"""Base of methods that update agents sequentially by natural gradients."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.modules import set_recurrent_mode
from typing_extensions import Unpack

from torchrl_marl.distributed import world_size
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.ratio import ClipOptions
from torchrl_marl.objectives.sequential import Learner, SequentialLoss
from torchrl_marl.objectives.surrogates import ratio_gain
from torchrl_marl.objectives.trust_region import StepOptions, check_step_options, trust_region_step
from torchrl_marl.signatures import check_choice, take_options

__all__ = ["NaturalGradientLoss", "NaturalGradientOptions"]


class NaturalGradientOptions(ClipOptions, StepOptions, total=False):
    """Options of natural-gradient losses; meanings and defaults are those of :class:`NaturalGradientLoss`."""

    max_kl: float


class NaturalGradientLoss(SequentialLoss):
    """Abstract sequential loss with natural-gradient updates; base of HATRPO and OATRPO.

    An agent's turn is one call of :meth:`step` on the whole batch instead of epochs of minibatches. The critic's turn
    is the same as in every sequential loss::

        for turn in loss.turns(batch):
            if turn != "critic":
                loss.step(batch)
                continue
            for minibatch in minibatches(batch): ...

    Args:
        max_kl: radius of the trust region (the papers' delta), in nats, 0.01 by default; a buffer, so it can be
            scheduled by assignment.
        **options: :class:`~torchrl_marl.objectives.trust_region.StepOptions` and
            :class:`~torchrl_marl.objectives.ratio.ClipOptions`. By default the surrogate is the ratio itself, without
            an entropy bonus. All gains have the same gradient at ratio 1, so another gain only affects the line search.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    max_kl: Tensor
    _schedulable_buffers = SequentialLoss._schedulable_buffers | {"max_kl"}

    abstract = True

    def __init__(self, actor_network: Actor, critic_network: Critic, **options: Unpack[NaturalGradientOptions]) -> None:
        others: Any = {"gain": ratio_gain, "entropy_coeff": 0.0, **options}
        max_kl = others.pop("max_kl", 0.01)
        if not 0 < max_kl < math.inf:
            raise ValueError(f"max_kl must be a number above 0; got {max_kl}.")
        self._step_options = take_options(others, StepOptions)
        check_step_options(**self._step_options)
        super().__init__(actor_network, critic_network, **others)
        check_choice("precision", self.precision, ("float32",))
        self._register(max_kl=max_kl)

    def check_loop(
        self, frames_per_batch: int, num_envs: int, minibatch_size: int, chunk_length: int | None = None
    ) -> None:
        """Reject settings that :meth:`phases` or :meth:`step` cannot use."""
        super().check_loop(frames_per_batch, num_envs, minibatch_size, chunk_length)
        if world_size() > 1:
            raise ValueError(f"{type(self).__name__} takes steps on a whole batch: train it in a single process.")
        if self.reduction != "mean":
            raise ValueError(f"loss.reduction must be mean, as a natural-gradient step requires; got {self.reduction}.")

    @property
    def takes_steps(self) -> bool:
        """Whether the turn is an agent's, which updates by :meth:`step`."""
        return isinstance(self.turn, int)

    @set_recurrent_mode(True)
    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Update the current agent's policy in place by one natural-gradient step, accepted by a line search.

        Args:
            tensordict: the whole batch, any shape ``[B]``.

        Returns:
            The outputs of ``forward`` after the step, and the step's ``step_fraction`` (0 if no step was accepted),
            ``improvement``, ``expected_improvement``, ``kl`` and ``grad_norm``. All are detached.

        Raises:
            ValueError: outside of an agent's turn, or if ``reduction`` is not ``"mean"``.
        """
        if not isinstance(self.turn, int):
            raise ValueError(
                f"step() needs an agent's turn, but the turn is {self.turn!r}: call it within turns(batch)."
            )
        if self.reduction != "mean":
            raise ValueError(f"A natural-gradient step needs reduction='mean', not {self.reduction!r}.")
        learner = cast("Learner", self._learner)
        policy, device = learner.policy, self.ratio_low.device
        devices = [device] if device.type == "cuda" else []
        experience, entropy_mask = self._experience(self._with_advantage(tensordict), learner)
        with torch.no_grad(), self._parameters_of("actor_network"):
            old = policy.get_dist(experience.copy())

        def evaluate() -> tuple[Tensor, Tensor]:
            with torch.random.fork_rng(devices):  # a sampled entropy uses the same noise at all parameters
                losses, new = self._actor_losses(experience, policy, entropy_mask)
            kl = policy_kl(old, new)
            mask = self._mask(experience, kl.shape)
            return -losses["loss_objective"] - losses["loss_entropy"], self._over_sources(kl, mask, experience)

        step = trust_region_step(self.agent_parameters(self.turn), evaluate, max_kl=self.max_kl, **self._step_options)
        with torch.no_grad():
            losses, _ = self._actor_losses(experience, policy, entropy_mask)
        return TensorDict({**losses, **step}).detach()
