"""Base of every method that weights an advantage by a probability ratio: one loss for any gain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictParams, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import ValueNorm
from torchrl.modules.distributions.utils import has_analytic_entropy, sample_and_log_prob
from torchrl.objectives import LossModule, ValueEstimators, distance_loss
from torchrl.objectives.common import AUTO_LOSS_MASK_KEYS
from torchrl.objectives.utils import dispatch_value_estimator
from torchrl.objectives.value import MultiAgentGAE, ValueEstimatorBase
from typing_extensions import Unpack

from torchrl_marl.distributed import gather
from torchrl_marl.keys import sibling
from torchrl_marl.modules.protocols import Actor, Bootstrapping, Critic, Remembering
from torchrl_marl.objectives import masking
from torchrl_marl.objectives.masking import Gather, alone, expand_mask, masked_mean, per_agent, where_live
from torchrl_marl.objectives.minibatches import Phase, check_chunks, sequences_in, split_into_chunks
from torchrl_marl.objectives.surrogates import Gain, clip_gain
from torchrl_marl.signatures import check_at_least_0, check_choice

__all__ = ["ClipLoss", "ClipOptions", "RatioLoss", "RatioOptions", "ScoredBatch", "clip_bounds"]

Bounds = tuple[float | Tensor, float | Tensor]
"""Lowest and highest ratio of an interval."""

LOSSES = ("loss_objective", "loss_entropy", "loss_critic")
DIAGNOSTICS = ("entropy", "kl_approx", "clip_fraction", "min_ratio", "max_ratio")
OUT_KEYS = (*LOSSES, *DIAGNOSTICS, "explained_variance")
"""Entries that ``forward`` of every ratio loss returns; a method may add entries."""


class RatioOptions(TypedDict, total=False):
    """Options of every ratio loss; meanings and defaults are those of :class:`RatioLoss`."""

    entropy_coeff: float
    critic_coeff: float
    loss_critic_type: str
    normalize_advantage: bool
    normalize_advantage_exclude_dims: Sequence[int]
    functional: bool
    reduction: str
    clip_value: float | None
    standardize_per_agent: bool
    precision: Literal["float32", "bfloat16"]


class ClipOptions(RatioOptions, total=False):
    """Options of losses with a clip; meanings and defaults are those of :class:`ClipLoss`."""

    clip_epsilon: float | Sequence[float]
    gain: Gain


class ScoredBatch(NamedTuple):
    """A batch evaluated by the current policy; the input of an objective."""

    data: TensorDictBase
    """The collected data, including the stored outputs of the old policy."""
    policy: Distribution
    log_ratio: Tensor
    """``[B, N]``, zero for dead agents."""
    advantage: Tensor
    """``[B, N]``, standardised if the loss standardises advantages, zero for dead agents."""
    mask: Tensor | None
    """Live agents ``[B, N]``; ``None`` if all live."""


class RatioLoss(LossModule):
    """Abstract actor-critic loss over per-agent probability ratios; a method chooses the gain and its bounds.

        loss_objective = -mean(gain(log r, A; low, high)),   r = pi(a|o) / pi_old(a|o) of each agent
        loss_entropy   = -entropy_coeff mean(H(pi(.|o)))
        loss_critic    =  critic_coeff mean(distance(value, value_target))

    The policy terms average over steps and live agents, the critic's loss over steps and all agents: the return of an
    agent continues after its death with the team's reward, so the value estimator bootstraps from the values of dead
    agents, and the critic must learn them. Log-probabilities stay per agent: there is no joint ratio. If the critic
    ends in a :class:`~torchrl_marl.modules.Denormalize` layer, its distance is measured in units of the value scale,
    so the network regresses normalised targets.

    Keys (see :mod:`torchrl_marl.keys`), all renamable with ``set_keys``: action, ``sample_log_prob`` and the group are
    taken from the actor, ``value`` from the critic; ``mask`` (live agents, ``[B, N]``) is used if the data holds it.
    Rows excluded by TorchRL's ``loss_mask_key``, such as padding, are ignored everywhere. If ``advantage`` is missing,
    the value estimator computes it.

    ``ratio_low``, ``ratio_high``, ``entropy_coeff`` and ``critic_coeff`` are buffers, so they can be scheduled by
    assignment.

    Args:
        actor_network: decentralised policy; its ``get_dist`` returns a distribution with a ``log_prob`` of ``[B, N]``.
        critic_network: writes the value, ``[B, N, 1]`` for each agent or ``[B, 1]`` for the team.
        gain: the trust region, a function of :mod:`torchrl_marl.objectives.surrogates` or your own.
        low: lower ratio bound or target ratio, in (0, 1).
        high: upper ratio bound or target ratio, above 1.
        entropy_coeff: weight of the entropy bonus.
        critic_coeff: weight of the critic's loss.
        loss_critic_type: ``"smooth_l1"``, ``"l2"`` or ``"l1"``.
        normalize_advantage: standardise the advantages of the data given to ``forward``. Turn it off if the training
            loop standardises the whole batch once with :func:`standardize`, as MAPPO's authors and the recipes do.
        normalize_advantage_exclude_dims: dimensions with separate statistics; by default the agent dimension.
        functional: hold parameters as TorchRL's functional losses do; ``False`` is simpler and faster.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (one entry per step and agent; policy terms are zero for dead
            agents).
        clip_value: half-width of PPO's value clipping around the stored value, in units of the value scale; the loss is
            the larger of the clipped and the unclipped distance. ``None`` disables value clipping.
        standardize_per_agent: let :meth:`prepare` standardise advantages for each agent separately, if advantages are
            per agent; by default all agents share the statistics.
        precision: ``"bfloat16"`` runs the networks' matrix products in the loss under ``torch.autocast``, where
            processors have such products. :meth:`prepare` then scores the batch's actions again in the same precision:
            those of the collector are rounded otherwise, which would move the ratios of an unchanged policy by 0.1.

    Raises:
        ValueError: if the bounds are on the wrong side of 1, or an option is not one of those listed.
    """

    @dataclass
    class _AcceptedKeys:
        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"
        value: NestedKey = ("agents", "state_value")
        action: NestedKey = ("agents", "action")
        sample_log_prob: NestedKey = ("agents", "action_log_prob")
        mask: NestedKey = ("agents", "mask")
        reward: NestedKey = ("agents", "reward")
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    default_value_estimator = ValueEstimators.MAGAE
    _schedulable_buffers = frozenset({"ratio_low", "ratio_high", "entropy_coeff", "critic_coeff"})

    abstract = True  # looked up in the class itself, so subclasses do not inherit it
    moves_buffers = False
    """Whether ``forward`` updates a buffer in training mode, such as MARPO's KL target."""
    trains_in_parts = False
    """Whether some phases train only part of the parameters; the other parameters must then have no gradient."""
    clipped_apart: str | None = None
    """Network whose gradient norm is clipped separately, such as ``"critic"``; ``None`` clips one joint norm."""

    actor_network: Actor
    critic_network: Critic
    ratio_low: Tensor
    ratio_high: Tensor
    entropy_coeff: Tensor
    critic_coeff: Tensor
    actor_network_params: TensorDictParams | None
    critic_network_params: TensorDictParams | None
    target_actor_network_params: TensorDictParams | None
    target_critic_network_params: TensorDictParams | None

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        gain: Gain,
        low: float,
        high: float,
        entropy_coeff: float = 0.01,
        critic_coeff: float = 1.0,
        loss_critic_type: str = "smooth_l1",
        normalize_advantage: bool = True,
        normalize_advantage_exclude_dims: Sequence[int] = (-2,),
        functional: bool = True,
        reduction: str = "mean",
        clip_value: float | None = None,
        standardize_per_agent: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        if "abstract" in vars(type(self)):
            made_of_it = ", ".join(method.__name__ for method in type(self).__subclasses__())
            raise TypeError(f"{type(self).__name__} is abstract: use {made_of_it} or a subclass.")
        if not surround_one(low, high):
            raise ValueError(
                f"Ratio bounds must satisfy 0 < low < 1 < high, got low={low!r} and high={high!r}, in float32."
            )
        check_choice("loss_critic_type", loss_critic_type, ("smooth_l1", "l2", "l1"))
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        check_choice("precision", precision, ("float32", "bfloat16"))
        if precision != "float32" and ("is_init" in actor_network.in_keys or isinstance(actor_network, Remembering)):
            raise ValueError(
                f"precision must be float32 for policies with a memory or that act agent by agent; got {precision!r}."
            )
        if clip_value is not None and not clip_value > 0:
            raise ValueError(f"clip_value must be above 0, or None for no clipping; got {clip_value!r}.")
        check_at_least_0(entropy_coeff=entropy_coeff, critic_coeff=critic_coeff)
        super().__init__()
        self._functional = functional
        self._selected: tuple[str, ...] | None = None
        self._hold("actor_network", actor_network)
        self._hold("critic_network", critic_network)
        self.gain = gain
        self.loss_critic_type = loss_critic_type
        self.normalize_advantage = normalize_advantage
        self.normalize_advantage_exclude_dims = tuple(normalize_advantage_exclude_dims)
        self.reduction = reduction
        self.clip_value, self.standardize_per_agent, self.precision = clip_value, standardize_per_agent, precision
        self._shared_keys = [key for key in critic_network.in_keys if key in actor_network.out_keys]
        self._device = next((parameter.device for parameter in self.parameters()), None)
        self._register(ratio_low=float(low), ratio_high=float(high))
        self._register(entropy_coeff=entropy_coeff, critic_coeff=critic_coeff)
        action = actor_network.dist_sample_keys[0]
        self.set_keys(
            action=action,
            sample_log_prob=actor_network.log_prob_keys[0],
            value=_value_key(critic_network),
            mask=sibling(action, "mask"),
            reward=sibling(action, "reward"),
        )

    def _register(self, **coefficients: float) -> None:
        """Register coefficients as buffers, which a schedule may assign to."""
        for name, value in coefficients.items():
            self.register_coeff_buffer(name, value, device=self._device)

    def _hold(self, name: str, network: Any) -> None:
        if isinstance(network, tuple):  # an (actor, critic) pair
            raise TypeError(f"{name} must be a network; got {type(network).__name__}.")
        if self._functional:
            self.convert_to_functional(network, name, create_target_params=False)
        else:
            setattr(self, name, network)
            setattr(self, f"{name}_params", None)

    @property
    def functional(self) -> bool:
        """Whether the loss holds parameters separately from the networks."""
        return self._functional

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads; ``data.select(*loss.in_keys, strict=False)`` keeps just these."""
        keys = self.tensor_keys
        read = [*self.actor_network.in_keys, *self.critic_network.in_keys]
        read += [keys.action, keys.sample_log_prob, keys.advantage, keys.value_target]
        read += [] if self.clip_value is None else [keys.value]
        return list(dict.fromkeys([*read, *self._own_keys(), self.tensor_keys.mask, *self._valid_keys()]))

    @property
    def out_keys(self) -> list[str]:
        """Entries that ``forward`` returns: all computed entries, or those chosen with :meth:`select_out_keys`."""
        keys = self._computed_keys()
        return keys if self._selected is None else [key for key in keys if key in self._selected]

    def select_out_keys(self, *out_keys: str) -> RatioLoss:
        """Let ``forward`` return these entries only, until :meth:`reset_out_keys`.

        Raises:
            ValueError: if ``forward`` does not compute one of the entries.
        """
        unknown = [key for key in out_keys if key not in self._computed_keys()]
        if unknown:
            raise ValueError(f"out_keys must be some of {', '.join(self._computed_keys())}; got {unknown}.")
        self._selected = out_keys
        return self

    def reset_out_keys(self) -> RatioLoss:
        """Let ``forward`` return all computed entries again."""
        self._selected = None
        return self

    def _computed_keys(self) -> list[str]:
        """Entries that ``forward`` computes."""
        return list(OUT_KEYS)

    def _output(self, entries: dict[str, Tensor]) -> TensorDict:
        """Return the computed entries, or the selected ones."""
        return TensorDict(entries if self._selected is None else {key: entries[key] for key in self.out_keys})

    def _own_keys(self) -> list[NestedKey]:
        """Entries that only this method reads."""
        return []

    def make_value_estimator(
        self, value_type: ValueEstimators | ValueEstimatorBase | type | None = None, **hyperparams: object
    ) -> RatioLoss:
        """Choose how advantages and value targets are computed; default: multi-agent GAE, gamma 0.99, lambda 0.95.

        Args:
            value_type: as in :meth:`torchrl.objectives.LossModule.make_value_estimator`, except V-trace: TorchRL's
                estimator does not support agent dimensions.
            **hyperparams: hyper-parameters of the estimator, such as ``gamma`` and ``lmbda``.

        Returns:
            The loss itself.
        """
        names = ("advantage", "value_target", "value", "reward", "done", "terminated")
        keys = {name: getattr(self.tensor_keys, name) for name in names}
        chosen = value_type or self.default_value_estimator
        if chosen is self.default_value_estimator and self._memory_keys:  # prepare calls the critic itself
            settings: Any = {"gamma": 0.99, "lmbda": 0.95, **hyperparams}
            chosen, hyperparams = MultiAgentGAE(value_network=None, **settings), {}
        if isinstance(chosen, (ValueEstimatorBase, type)):
            super().make_value_estimator(cast("Any", chosen), **hyperparams)
            self.value_estimator.set_keys(**keys)
        else:
            supported = [known for known in ValueEstimators if known is not ValueEstimators.VTrace]
            dispatch_value_estimator(self, chosen, supported=supported, tensor_keys=keys, **hyperparams)
        return self

    @torch.no_grad()
    def prepare(self, batch: TensorDictBase) -> TensorDictBase:
        """Write the entries that training needs into a batch in time order, once for all epochs.

        The entries are advantages, value targets and entries of the method. Advantages are standardised over the whole
        batch and its live agents as by MAPPO's authors (with ``standardize_per_agent``, for each agent). The critic's
        value statistics are updated with the targets. All statistics span every process of ``torch.distributed``. A
        loop that needs other advantages calls the parts itself.

        Args:
            batch: a collector's batch ``[*B, T]``, modified in place.

        Returns:
            The same batch.
        """
        keys = self.tensor_keys
        self._estimate(batch)
        self.update_value_norm(batch, gather=gather)
        advantage = batch.get(keys.advantage)
        mask = self._mask(batch, advantage.shape[:-1])
        apart = (
            (-2,) if self.standardize_per_agent and advantage.ndim > batch.ndim + 1 else ()
        )  # a team has one advantage
        batch.set(keys.advantage, masking.standardize(advantage, mask, exclude_dims=apart, gather=gather))
        if self.precision != "float32":
            batch.set(keys.sample_log_prob, batch.get(keys.sample_log_prob) + self._rounding(batch))
        self._complete(batch)
        return batch

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield the training phases of a batch; by default a single phase trains every parameter.

        The loop of every method::

            loss.prepare(batch)
            for phase in loss.phases(batch):
                for minibatch in phase.minibatches(1000, epochs=5):
                    update(minibatch)

        Args:
            batch: batch returned by :meth:`prepare`.
            chunk_length: consecutive steps that a recurrent network is trained on; ``None`` for single rows.

        Raises:
            ValueError: if ``chunk_length`` does not divide the batch's steps, or is set for a policy whose memory
                requires whole sequences.
        """
        yield self._phase(batch, chunk_length)

    def check_loop(
        self, frames_per_batch: int, num_envs: int, minibatch_size: int, chunk_length: int | None = None
    ) -> None:
        """Reject settings that :meth:`phases` cannot use, before data is collected.

        Args:
            frames_per_batch: steps of a batch over all environments, rounded up to whole steps of every environment.
            num_envs: number of environments.
            minibatch_size: steps of a minibatch.
            chunk_length: see :meth:`phases`.

        Raises:
            ValueError: with the allowed values.
        """
        num_steps = -(-frames_per_batch // num_envs)
        if self.learns_sequences:
            sequences_in(minibatch_size, num_steps)
            if chunk_length is not None:
                raise ValueError(
                    f"chunk_length must be null, as the loss trains on whole sequences; got {chunk_length}."
                )
            return
        chunk_length = self._chunk_length(chunk_length, num_steps)
        check_chunks(num_steps, chunk_length)
        if chunk_length is None and "is_init" in [*self.actor_network.in_keys, *self.critic_network.in_keys]:
            raise ValueError("chunk_length must be an integer: a recurrent policy needs consecutive steps; got null.")

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are clipped by a joint norm, by the name under which the norm is logged."""
        if self.clipped_apart is None:
            return {"grad_norm": list(self.parameters())}
        others, apart = self._parted(self.clipped_apart)
        return {"grad_norm": others, f"{self.clipped_apart}_grad_norm": apart}

    def parameter_groups(self, *, critic_lr: float | None = None) -> list[dict[str, Any]]:
        """Parameters as optimisers take them, those of the critic alone with a learning rate of their own.

        Args:
            critic_lr: that of the critic; ``None`` for one learning rate. What the critic shares with an actor, such as
                MAT's encoder, learns as the actor does.
        """
        if critic_lr is None:
            return [{"params": list(self.parameters())}]
        others, critic = self._parted("critic")
        return [{"params": others}, {"params": critic, "lr": critic_lr}]

    def _parted(self, network: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All other parameters, and those of one network alone."""
        parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for name, parameter in self.named_parameters():  # each once, under the first network that has it
            parts[name.startswith(f"{network}_network")].append(parameter)
        return parts

    @property
    def trained(self) -> nn.Module | None:
        """Module of all parameters that the current phase trains; ``None`` if phases of a part do not name it."""
        return None if self.trains_in_parts else self

    @property
    def takes_steps(self) -> bool:
        """Whether the current phase updates parameters by :meth:`step` instead of an optimiser."""
        return False

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Update parameters in place and return diagnostics; only for losses with ``takes_steps``."""
        raise NotImplementedError(f"{type(self).__name__} is trained by an optimiser.")

    def metrics(self) -> dict[str, Tensor]:
        """Diagnostics of the loss after a batch, for logs."""
        return {}

    def _rounding(self, batch: TensorDictBase) -> Tensor:
        """Log-ratio of the policy to itself, ``[*B, N]``, which the loss's precision causes."""
        return self._log_ratio(batch.copy())[1]

    def _complete(self, batch: TensorDictBase) -> None:
        """Write entries besides advantages and targets; a hook for methods that need more."""

    def _phase(self, batch: TensorDictBase, chunk_length: int | None, **options: Any) -> Phase:
        data = batch.select(*self.in_keys, strict=False)
        if not self.learns_sequences:
            return Phase(split_into_chunks(data, self._chunk_length(chunk_length, batch.shape[-1])), **options)
        if chunk_length is not None:
            raise ValueError(f"{type(self).__name__} trains on whole sequences here: chunk_length must be None.")
        return Phase(data, sequences=True, states=self._memory_keys, **options)

    def _chunk_length(self, chunk_length: int | None, num_steps: int) -> int | None:
        """Chunk length if the loop sets none; a hook for methods that need consecutive steps."""
        return chunk_length

    @property
    def _memory_keys(self) -> list[NestedKey]:
        return self.actor_network.memory_keys if isinstance(self.actor_network, Remembering) else []

    @property
    def learns_sequences(self) -> bool:
        """Whether minibatches are whole sequences, which need the memory of their first step only."""
        return bool(self._memory_keys)

    @torch.no_grad()
    def update_value_norm(self, tensordict: TensorDictBase, *, gather: Gather = alone) -> None:
        """Update the critic's running value statistics with the value targets.

        Call it once per batch, after the value estimator; it is a no-op if the critic does not normalise values.

        Args:
            tensordict: data with the value target.
            gather: concatenates the shards of a batch that several processes hold, such as
                :func:`torchrl_marl.distributed.gather`.
        """
        value_norm = self._value_norm()
        if value_norm is None:
            return
        target = tensordict.get(self.tensor_keys.value_target)
        valid = self._valid(tensordict, target.shape[:-1])
        targets = gather(target) if valid is None else gather(target)[gather(valid)]
        if targets.numel() == 0:  # statistics of no values would stay NaN forever
            return
        with self._parameters_of("critic_network"):
            value_norm.update(targets)

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``, not modified.

        Returns:
            A TensorDict with ``loss_objective``, ``loss_entropy`` and ``loss_critic`` (back-propagate their sum) and
            the scalars ``entropy``, ``kl_approx`` (the non-negative estimate ``mean(r - 1 - ln r)``), ``clip_fraction``
            (share of ratios outside ``[low, high]``), ``min_ratio``, ``max_ratio`` and ``explained_variance`` (critic).

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit, or stored log-probabilities carry gradients.
        """
        tensordict = self._with_advantage(tensordict)
        losses, _ = self._actor_losses(tensordict, self.actor_network)
        return self._output({**losses, **self._critic_losses(tensordict)})

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reduced ``loss_objective`` and a method's own losses and diagnostics; a hook for methods."""
        return self._reduce(-self._gain_of(batch.log_ratio, batch.advantage), batch.mask), {}

    def _gain_of(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return self.gain(log_ratio, advantage, low=self.ratio_low, high=self.ratio_high)

    def _with_advantage(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Copy the batch; if it has no advantages, add those of the value estimator and its targets."""
        tensordict = tensordict.copy()
        if self.tensor_keys.advantage not in tensordict.keys(True):
            self._estimate(tensordict)
        return tensordict

    @torch.no_grad()
    def _estimate(self, tensordict: TensorDictBase) -> None:
        if self.value_estimator.value_network is None and isinstance(self.critic_network, Bootstrapping):
            with self._parameters_of("critic_network"):
                self.critic_network.bootstrap(tensordict)
            self.value_estimator(tensordict)
        else:
            params = None if self.critic_network_params is None else self.critic_network_params.detach()
            self.value_estimator(tensordict, params=params)

    def _actor_losses(
        self, tensordict: TensorDictBase, policy: Actor, entropy_mask: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Distribution]:
        """Objective, entropy and diagnostics of ``policy``, and its distributions.

        Args:
            tensordict: the batch; its group may be a selection of agents.
            policy: policy of the selected agents.
            entropy_mask: mask of the entropy; ``None`` for all live agents.
        """
        distribution, log_ratio = self._log_ratio(tensordict, policy)
        mask = self._mask(tensordict, log_ratio.shape)
        log_ratio = where_live(log_ratio, mask)  # dead agents get r = 1: their stored log-probabilities have no effect
        advantage = self._advantage(tensordict, tensordict.get(self.tensor_keys.advantage), log_ratio.shape)
        batch = ScoredBatch(tensordict, distribution, log_ratio, where_live(advantage, mask), mask)
        loss_objective, others = self.objective(batch)
        entropy = policy_entropy(distribution)
        entropy_mask = mask if entropy_mask is None else entropy_mask
        losses = {
            "loss_objective": loss_objective,
            "loss_entropy": -self.entropy_coeff * self._reduce(entropy, entropy_mask),
            "entropy": masked_mean(entropy.detach(), entropy_mask),
            **ratio_diagnostics(log_ratio.detach(), mask, self.ratio_low, self.ratio_high),
            **others,
        }
        return losses, distribution

    def _critic_losses(self, tensordict: TensorDictBase) -> dict[str, Tensor]:
        distance, explained_variance = self._critic_distance(tensordict)
        return {"loss_critic": self.critic_coeff * distance, "explained_variance": explained_variance}

    def _parameters_of(self, name: str) -> contextlib.AbstractContextManager:
        params = getattr(self, f"{name}_params") if self._functional else None
        if params is None:
            return contextlib.nullcontext()
        return params.to_module(getattr(self, name), preserve_module_state=False)

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast("cpu" if self._device is None else self._device.type, torch.bfloat16)

    def _distribution(self, policy: Actor, acted: TensorDictBase) -> Distribution:
        """A policy's distributions, whose parameters are float32 again if the network is not."""
        with self._autocast():
            distribution = policy.get_dist(acted)
        if self.precision == "float32":
            return distribution
        for key in policy[-1].in_keys:
            value = acted.get(key, None)
            if value is not None and value.is_floating_point():
                acted.set(key, value.float())
        return policy.build_dist_from_params(acted)

    def _log_ratio(self, tensordict: TensorDictBase, policy: Actor | None = None) -> tuple[Distribution, Tensor]:
        policy = self.actor_network if policy is None else policy
        keys = self.tensor_keys
        stored = require(tensordict, keys.sample_log_prob)
        if stored.requires_grad:
            raise ValueError(
                f"The stored log-probability {keys.sample_log_prob!r} requires grad: collect data under no_grad."
            )
        with self._parameters_of("actor_network"):
            acted = tensordict.copy()
            distribution = self._distribution(policy, acted)
        for key in self._shared_keys:  # output of an encoder shared by both networks, from which the critic continues
            tensordict.set(key, acted.get(key))
        log_prob = distribution.log_prob(require(tensordict, keys.action))
        if log_prob.shape != stored.shape:
            raise ValueError(
                f"The policy's log-probabilities have shape {tuple(log_prob.shape)}, but {keys.sample_log_prob!r} "
                f"has shape {tuple(stored.shape)}: both must be [*batch, agents]."
            )
        return distribution, log_prob - stored

    def _old_policy(self, tensordict: TensorDictBase) -> Distribution:
        """The policy that collected; a method that asks for it names ``actor_network[-1].in_keys`` in ``_own_keys``."""
        missing = [key for key in self.actor_network[-1].in_keys if tensordict.get(key, None) is None]
        if missing:
            raise KeyError(
                f"The data has no {', '.join(map(repr, missing))}: {type(self).__name__} measures the divergence from "
                "the policy that collected it, so keep the parameters of its distribution, which the actor writes, in "
                "the batch."
            )
        return self.actor_network.build_dist_from_params(tensordict)

    def _advantage(self, tensordict: TensorDictBase, advantage: Tensor, shape: torch.Size) -> Tensor:
        """Convert advantages to ``[B, N]``; standardise them with the batch's statistics if the loss does so."""
        if self.normalize_advantage:
            own = tensordict.get(self.tensor_keys.advantage)
            dims = self.normalize_advantage_exclude_dims if own.ndim > len(shape) else ()
            mean, deviation = masking.mean_and_deviation(own, self._mask(tensordict, own.shape[:-1]), dims)
            advantage = (advantage - mean) / deviation
        return per_agent(advantage, shape, self.tensor_keys.advantage)

    def _critic_distance(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Reduced distance of the critic from its target, in units of the value scale, and explained variance."""
        keys = self.tensor_keys
        target = require(tensordict, keys.value_target)
        valid = self._valid(tensordict, target.shape[:-1])
        old_value = None if self.clip_value is None else require(tensordict, keys.value)
        with self._parameters_of("critic_network"), self._autocast():
            value = self.critic_network(tensordict).get(keys.value).to(target.dtype)
            scale = self._value_scale()
        if value.shape != target.shape:
            raise ValueError(
                f"The critic's {keys.value!r} has shape {tuple(value.shape)}, but {keys.value_target!r} has shape "
                f"{tuple(target.shape)}: recompute advantages and targets with this loss's value estimator."
            )
        value, target = (where_live(x, None if valid is None else valid.unsqueeze(-1)) for x in (value, target))
        explainable = masking.variance(target.detach(), valid)
        unexplained = masking.variance((target - value).detach(), valid)
        explained = 1 - unexplained / explainable.clamp(min=torch.finfo(explainable.dtype).eps)
        distance = self._value_distance(value, target, old_value, scale)
        return self._reduce(distance.squeeze(-1), valid), explained

    def _value_distance(self, value: Tensor, target: Tensor, old: Tensor | None, scale: Tensor | float) -> Tensor:
        """Elementwise distance in units of the value scale; with an old value, at least the clipped distance."""
        value, target = value / scale, target / scale  # (v - m) / s - (t - m) / s: the mean cancels
        distance = distance_loss(value, target, self.loss_critic_type)
        if old is None or self.clip_value is None:
            return distance
        clipped = old / scale + (value - old / scale).clamp(-self.clip_value, self.clip_value)
        return torch.maximum(distance, distance_loss(clipped, target, self.loss_critic_type))

    def _value_scale(self) -> Tensor | float:
        value_norm = self._value_norm()
        return 1.0 if value_norm is None else value_norm.scale()

    def _value_norm(self) -> ValueNorm | None:
        return next((module for module in self.critic_network.modules() if isinstance(module, ValueNorm)), None)

    def _valid_keys(self) -> list[NestedKey]:
        named = self.loss_mask_key
        return [] if named is None else list(AUTO_LOSS_MASK_KEYS) if named == "auto" else [named]

    def _valid(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor | None:
        """Mask of rows that are not padding, ``[*batch, agents]`` or ``[*batch]`` as ``shape``; ``None`` if all are."""
        return self._joined(self._valid_keys(), tensordict, shape)

    def _mask(self, tensordict: TensorDictBase, shape: torch.Size) -> Tensor | None:
        """Mask of valid rows whose agent is alive: the rows that train the policy."""
        return self._joined([self.tensor_keys.mask, *self._valid_keys()], tensordict, shape)

    @staticmethod
    def _joined(keys: Sequence[NestedKey], tensordict: TensorDictBase, shape: torch.Size) -> Tensor | None:
        joined = None
        for key in keys:
            found = tensordict.get(key, None)
            if found is not None:
                found = expand_mask(found, shape, tensordict.batch_size, key)
                joined = found if joined is None else joined & found
        return joined

    def _reduce(self, values: Tensor, mask: Tensor | None) -> Tensor:
        if self.reduction == "mean":
            return masked_mean(values, mask)
        return where_live(values, mask).sum() if self.reduction == "sum" else where_live(values, mask)


class ClipLoss(RatioLoss):
    """Abstract ratio loss with the bounds of a clip.

    Args:
        actor_network: as for :class:`RatioLoss`.
        critic_network: as for :class:`RatioLoss`.
        clip_epsilon: half-width of the clip, or a pair ``(low, high)`` for the interval ``[1 - low, 1 + high]``.
        gain: another trust region in place of the clip, with the same bounds.
        **options: :class:`RatioOptions`.
    """

    abstract = True

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = clip_gain,
        **options: Unpack[RatioOptions],
    ) -> None:
        low, high = clip_bounds(clip_epsilon)
        super().__init__(actor_network, critic_network, gain=gain, low=low, high=high, **options)


def clip_bounds(clip_epsilon: float | Sequence[float]) -> tuple[float, float]:
    """Ratio bounds ``(1 - low, 1 + high)`` of a half-width, or of a pair ``(low, high)`` of half-widths.

    Raises:
        ValueError: if a width is not positive, the lower width is at least 1, or the widths are not one or two.

    Example:
        >>> clip_bounds(0.25), clip_bounds((0.25, 0.5))
        ((0.75, 1.25), (0.75, 1.5))
    """
    widths = (clip_epsilon, clip_epsilon) if isinstance(clip_epsilon, (int, float)) else tuple(clip_epsilon)
    if len(widths) != 2 or not 0 < widths[0] < 1 or not widths[1] > 0:
        raise ValueError(
            "clip_epsilon must be a number in (0, 1) or a pair (low, high) with 0 < low < 1 and high > 0, "
            f"got {clip_epsilon}."
        )
    return 1 - widths[0], 1 + widths[1]


def clip_fraction(log_ratio: Tensor, mask: Tensor | None, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Share of live agents' ratios outside ``[low, high]``, detached."""
    ratio = log_ratio.detach().exp()
    return masked_mean(((ratio < low) | (ratio > high)).to(ratio.dtype), mask)


def ratio_diagnostics(log_ratio: Tensor, mask: Tensor | None, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Diagnostics of detached log-ratios, over live agents."""
    smallest, largest = masking.extremes(log_ratio.exp(), mask)
    return {
        "kl_approx": masked_mean(log_ratio.expm1() - log_ratio, mask),
        "clip_fraction": clip_fraction(log_ratio, mask, low, high),
        "min_ratio": smallest,
        "max_ratio": largest,
    }


def policy_entropy(distribution: Distribution) -> Tensor:
    """Entropy of each agent's policy, ``[B, N]``, in closed form or from one reparameterised sample."""
    if has_analytic_entropy(distribution):
        return distribution.entropy()
    if not distribution.has_rsample:
        raise ValueError(
            f"{type(distribution).__name__} has neither a closed-form entropy nor reparameterised samples."
        )
    _, log_prob = sample_and_log_prob(
        distribution, reparameterize=True
    )  # log-probability before squashing: exact where tanh saturates
    return -log_prob


def _value_key(critic_network: Critic) -> NestedKey:
    named = [key for key in critic_network.out_keys if (key if isinstance(key, str) else key[-1]) == "state_value"]
    return (named or list(critic_network.out_keys))[-1]


def require(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    value = tensordict.get(key, None)
    if value is None:
        raise KeyError(
            f"{key!r} is missing from the data, which holds {sorted(map(str, tensordict.keys(True, True)))}."
        )
    return value


def surround_one(low: float, high: float) -> bool:
    """Whether ``0 < low < 1 < high`` holds in float32, the type of a loss's buffers."""
    low, high = torch.tensor([low, high], dtype=torch.float32).tolist()
    return 0 < low < 1 < high
