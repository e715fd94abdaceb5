"""The base of methods that update one agent after the other: whose turn it is, and what the others have done so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.modules import set_recurrent_mode
from typing_extensions import Unpack

from torchrl_marl.distributed import any_process, broadcast_from_main, broadcast_state, world_size
from torchrl_marl.keys import sibling
from torchrl_marl.modules.agent_networks import agent_policy, count_agents
from torchrl_marl.modules.recurrent import recurrent_state_keys
from torchrl_marl.objectives.divergences import policy_kl
from torchrl_marl.objectives.masking import masked_mean, per_agent
from torchrl_marl.objectives.phases import Phase
from torchrl_marl.objectives.ratio import (
    OUT_KEYS,
    RatioLoss,
    RatioOptions,
    check_at_least_0,
    clip_bounds,
    require,
)
from torchrl_marl.objectives.reuse import ReuseMappingSampler
from torchrl_marl.objectives.surrogates import Gain, clip_gain, ratio_gain
from torchrl_marl.objectives.trust_region import trust_region_step

__all__ = ["NaturalGradientLoss", "NaturalGradientOptions", "SequentialLoss", "SequentialOptions", "Turn"]

Turn = int | Literal["critic"]


class SequentialOptions(RatioOptions, total=False):
    """Options of every sequential loss; meanings and defaults are those of :class:`SequentialLoss`."""

    clip_epsilon: float | Sequence[float]
    gain: Gain


class SequentialLoss(RatioLoss):
    """Ratio loss of one agent at a time; abstract: HAPPO, HATRPO, OAPPO and OATRPO are made of it.

        loss_objective of agent i = -sum_j M[i, j] mean(F_j gain(log r_j, A_j; low, high)) over rows where j lives
        r_j = pi_i(a_j|o_j) / pi_j_old(a_j|o_j)
        F_j = product of pi_l(a_l|o_l) / pi_l_old(a_l|o_l) over the agents l != j that have had their turn

    Agent i, the learner, sees the experience of its sources j; with M the identity it sees its own alone. The compound
    ratio F says how much more likely the updates so far have made what the others did.

    In a training loop the turns come from :meth:`turns`; all that a turn asks for is to train on ``loss(minibatch)``::

        optimizer = torch.optim.Adam(loss.parameters())
        for batch in collector:
            with torch.no_grad():
                loss.value_estimator(batch)
            for turn in loss.turns(batch):  # the agents' indices in random order, then "critic"
                for minibatch in minibatches(batch):
                    losses = loss(minibatch)
                    sum(value for key, value in losses.items() if key.startswith("loss_")).backward()
                    optimizer.step()
                    optimizer.zero_grad()

    One optimiser does for all. Every agent's parameters are leaves of their own
    (:class:`~torchrl_marl.modules.AgentNetworks`), an agent's turn gives gradients to these only, and the others'
    ``grad`` stays ``None``, which optimisers skip: parameters, momentum and step counts of the others remain as they
    are, bit for bit. (So call ``zero_grad`` with its default, ``set_to_none=True``.) Agents act in one batched forward
    pass; in its turn a learner's network sees all its sources in one.

    ``turns`` writes into the batch what minibatches must carry: ``update_log_ratio`` ``[B, N]``, the log-ratio of the
    agents that have been updated, zero for the rest, hence for nobody before the first turn. Take minibatches from the
    batch as it is within the turn, not from an earlier copy.

    Networks with a memory get sequences ``[*B, time]``, in ``turns`` and in ``forward``
    (:func:`~torchrl_marl.objectives.minibatches.split_into_chunks`). A learner's memory of its own sequence starts from
    the stored state, that of another source's from zeros: the state stored there is the source's network's. Where
    sources are drawn, one is drawn for each learner and sequence.

    In an agent's turn ``forward`` returns the objective and the entropy of this agent, in the critic's turn the
    critic's loss. Outside of any turn (``loss.turn`` is ``None``) it returns those of all agents at once, on their own
    experience, and the critic's: with the clip it is MAPPO with networks of agents' own.

    Keys, shapes and errors otherwise: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent, such as
            ``make_actor(env, share_parameters=False)``.
        critic_network: one for all agents.
        reuse: whose experience each agent learns from; ``None`` for its own.
        sampled: draw one source for each learner and row instead of weighting all of them.
        clip_epsilon: half-width of the clip, or a pair ``(low, high)``: ratios count within ``[1 - low, 1 + high]``.
        gain: another trust region in place of the clip, with the same bounds.
        **options: :class:`~torchrl_marl.objectives.ratio.RatioOptions`.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    @dataclass
    class _AcceptedKeys(RatioLoss._AcceptedKeys):
        update_log_ratio: NestedKey = ("agents", "update_log_ratio")
        reuse_source: NestedKey = ("agents", "reuse_source")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        reuse: ReuseMappingSampler | None,
        sampled: bool,
        clip_epsilon: float | Sequence[float] = 0.2,
        gain: Gain = clip_gain,
        **options: Unpack[RatioOptions],
    ) -> None:
        if type(self) is SequentialLoss:
            raise TypeError(
                "SequentialLoss is abstract: use HAPPOLoss, HATRPOLoss, OAPPOLoss, OATRPOLoss or a subclass."
            )
        num_agents = count_agents(actor_network)
        low, high = clip_bounds(clip_epsilon)
        super().__init__(actor_network, critic_network, gain=gain, low=low, high=high, **options)
        action = self.tensor_keys.action
        self.set_keys(
            update_log_ratio=sibling(action, "update_log_ratio"), reuse_source=sibling(action, "reuse_source")
        )
        self.reuse = reuse
        self.sampled = sampled
        # a plain list: these policies are other ways to run the actor's networks, with nothing of their own to register
        self._policies = [agent_policy(actor_network, agent) for agent in range(num_agents)]
        self._state_keys = recurrent_state_keys(actor_network)
        self.turn = None

    @property
    def num_agents(self) -> int:
        """Number of agents, each with a network of its own."""
        return len(self._policies)

    @property
    def turn(self) -> Turn | None:
        """Whose losses ``forward`` returns: an agent's, by index, ``"critic"``, or ``None`` for all at once.

        :meth:`turns` sets it. Loops of another kind can do so themselves.
        """
        return self._turn

    @turn.setter
    def turn(self, turn: Turn | None) -> None:
        if not (turn in (None, "critic") or (isinstance(turn, int) and 0 <= turn < self.num_agents)):
            raise ValueError(f"turn must be an agent from 0 to {self.num_agents - 1}, 'critic' or None; got {turn!r}.")
        self._turn: Turn | None = turn
        self._learner: _Learner | None = None
        if isinstance(turn, int):
            sources = (turn,) if self.reuse is None else self.reuse.sources(turn)
            index = partial(torch.tensor, device=self.ratio_low.device)
            self._learner = _Learner(self._policies[turn], index([turn]), index(sources))

    def _computed_keys(self) -> list[str]:
        """Entries that ``forward`` computes in this turn."""
        critic = ["loss_critic", "explained_variance"]
        if self.turn == "critic":
            return critic
        keys = [key for key in OUT_KEYS if key not in critic]
        return [*keys, *critic] if self.turn is None else [*keys, "mean_compound_ratio", "max_compound_ratio"]

    def agent_parameters(self, agent: int) -> list[nn.Parameter]:
        """Return the parameters of one agent's policy, for an optimiser of its own for example."""
        with self._parameters_of("actor_network"):
            return list(self._policies[agent].parameters())

    def reuse_weights(self) -> dict[str, Tensor]:
        """Return ``reuse_i_j``, the share of agent j's experience in what agent i learns from, for logs."""
        matrix = torch.eye(self.num_agents) if self.reuse is None else self.reuse.matrix.clone()
        return {f"reuse_{i}_{j}": weight for i, row in enumerate(matrix) for j, weight in enumerate(row)}

    def turns(self, tensordict: TensorDictBase, *, order: Sequence[int] | None = None) -> Iterator[Turn]:
        """Give every agent its turn, then the critic.

        After an agent's turn its new policy is compared with the stored one over the whole batch. An agent is left out
        if none of its sources has a live row in the batch.

        Args:
            tensordict: a batch of any shape ``[B]``; ``update_log_ratio`` (and ``reuse_source``) are written into it.
            order: of the agents; by default a random one, drawn anew on each call.

        Yields:
            What :attr:`turn` is meanwhile.

        Raises:
            ValueError: if the order is not one of all agents.
        """
        order = broadcast_from_main(lambda: torch.randperm(self.num_agents).tolist()) if order is None else list(order)
        if sorted(order) != list(range(self.num_agents)):
            raise ValueError(f"order must name every agent from 0 to {self.num_agents - 1} once, got {order}.")
        keys = self.tensor_keys
        stored = require(tensordict, keys.sample_log_prob)
        mask = self._mask(tensordict, stored.shape)
        if self.reuse is not None:
            with self._parameters_of("actor_network"):
                self.reuse.update(self.actor_network, tensordict, mask)
            broadcast_state(self.reuse)  # measured on the first process's rows
            if self.sampled:
                rows = (*stored.shape[:-2], 1) if self._state_keys else stored.shape[:-1]
                tensordict.set(keys.reuse_source, self.reuse.sample(rows).expand(stored.shape))
        log_ratio = torch.zeros_like(stored)
        tensordict.set(keys.update_log_ratio, log_ratio)
        try:
            for agent in order:
                self.turn = agent
                learner = cast("_Learner", self._learner)
                if mask is None or any_process(bool(mask.index_select(-1, learner.sources).any())):
                    yield agent
                    log_ratio = log_ratio.clone()
                    log_ratio[..., agent] = self._update_log_ratio(tensordict, learner, mask)
                    tensordict.set(keys.update_log_ratio, log_ratio)
            self.turn = "critic"
            yield "critic"
        finally:
            self.turn = None

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield a phase for every agent in random order, then the critic's; see :meth:`turns`."""
        phase = self._phase(batch, chunk_length)
        for _ in self.turns(phase.rows):
            yield replace(phase, whole=self.takes_steps)

    @property
    def trains_in_parts(self) -> bool:
        """Agents have their turns."""
        return True

    def gradient_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters whose gradients are scaled down to one norm together: an agent's, or the critic's."""
        critic = set(self.critic_network.parameters())
        return {
            "grad_norm": [parameter for parameter in self.parameters() if parameter not in critic],
            "critic_grad_norm": [parameter for parameter in self.parameters() if parameter in critic],
        }

    def metrics(self) -> dict[str, Tensor]:
        """Return ``reuse_i_j``, the share of agent j's experience in what agent i learns from."""
        return self.reuse_weights()

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of the turn and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``; it is not changed.

        Returns:
            A TensorDict with ``out_keys``: those of :meth:`RatioLoss.forward` that belong to the turn and, in an
            agent's, the mean and the largest compound ratio.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit, or stored log-probabilities carry gradients.
        """
        if self._learner is not None:  # not by its number: what is compiled for one agent then serves all
            experience, entropy_mask = self._experience(self._with_advantage(tensordict), self._learner)
            losses, _ = self._actor_losses(experience, self._learner.policy, entropy_mask)
            return self._output(losses)
        if self.turn is None:
            return super().forward(tensordict)
        return self._output(self._critic_losses(self._with_advantage(tensordict)))

    def objective(
        self,
        tensordict: TensorDictBase,
        distribution: Distribution,
        log_ratio: Tensor,
        advantage: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the learner's ``loss_objective`` over its sources ``[B, S]``, or all agents' outside of any turn."""
        gain = self.gain(log_ratio, advantage, low=self.ratio_low, high=self.ratio_high)
        if self._learner is None:
            return self._reduce(-gain, mask), {}
        compound = tensordict.get(self.tensor_keys.update_log_ratio).exp()
        diagnostics = {
            "mean_compound_ratio": masked_mean(compound, mask),
            "max_compound_ratio": (compound if mask is None else compound.where(mask, 0.0)).max(),
        }
        return self._over_sources(-compound * gain, mask, tensordict), diagnostics

    def _own_keys(self) -> list[NestedKey]:
        """Entries that only sequential methods read."""
        keys = self.tensor_keys
        return [keys.update_log_ratio, keys.reuse_source] if self.sampled else [keys.update_log_ratio]

    def _experience(self, tensordict: TensorDictBase, learner: _Learner) -> tuple[TensorDict, Tensor | None]:
        """What ``learner`` learns from, its sources' slots ``[*B, S]`` being the group, and where its entropy counts.

        The compound log-ratio of each slot takes the place of the update log-ratio. The entropy is that on the
        learner's own observations.
        """
        keys = self.tensor_keys
        stored = require(tensordict, keys.sample_log_prob)
        if self.sampled:
            source = require(tensordict, keys.reuse_source).index_select(-1, learner.index)
            take, own = _take_along(source), source == learner.index
        else:
            take, own = _take_each(learner.sources, dim=stored.ndim - 1), None
            if len(learner.sources) > 1:
                own = (learner.sources == learner.index).expand(*stored.shape[:-1], -1)
        experience = self._observed(tensordict, take, own)
        for key in (keys.action, keys.sample_log_prob):
            experience.set(key, take(require(tensordict, key)))
        advantage = per_agent(tensordict.get(keys.advantage), stored.shape, keys.advantage)
        experience.set(keys.advantage, take(advantage).unsqueeze(-1))
        updates = tensordict.get(keys.update_log_ratio, torch.zeros_like(stored))
        experience.set(keys.update_log_ratio, take(updates.sum(-1, keepdim=True) - updates))
        mask = self._mask(tensordict, stored.shape)
        if mask is not None:
            live = take(mask)
            experience.set(keys.mask, live)
            own = None if own is None else own & live
            if self.sampled:  # a mean over live draws would slight the sources that live less often
                counts = mask.flatten(0, -2).sum(0).clamp(min=1)
                experience.set("source_weight", live.sum() / take(counts.expand(mask.shape)))
        return experience, own

    @set_recurrent_mode(True)
    def _update_log_ratio(self, tensordict: TensorDictBase, learner: _Learner, mask: Tensor | None) -> Tensor:
        """``log pi_new - log pi_old`` of an agent that has had its turn, ``[*B]``, zero where it is dead."""
        keys = self.tensor_keys
        stored = tensordict.get(keys.sample_log_prob)
        take = _take_each(learner.index, dim=stored.ndim - 1)
        with torch.no_grad(), self._parameters_of("actor_network"):
            policy = learner.policy.get_dist(self._observed(tensordict, take))
        log_ratio = policy.log_prob(take(tensordict.get(keys.action))) - take(stored)
        return (log_ratio if mask is None else torch.where(take(mask), log_ratio, 0.0)).squeeze(-1)

    def _observed(
        self, tensordict: TensorDictBase, take: Callable[[Tensor], Tensor], own: Tensor | None = None
    ) -> TensorDict:
        """What a policy reads, with some agents' slots of the group's entries, and a memory in its own ones only."""
        action = self.tensor_keys.action
        group = action[:-1] if isinstance(action, tuple) else ()
        entries = {}
        for key in self.actor_network.in_keys:
            value, path = tensordict.get(key, None), (key,) if isinstance(key, str) else key
            if value is not None:
                entries[key] = take(value) if path[: len(group)] == group else value
                if own is not None and key in self._state_keys:
                    entries[key] = torch.where(own.unsqueeze(-1), entries[key], 0.0)
        # not the batch size of the data: it counts agents too if forward was given plain tensors
        return TensorDict(entries, batch_size=tensordict.get(self.tensor_keys.sample_log_prob).shape[:-1])

    def _over_sources(self, values: Tensor, mask: Tensor | None, experience: TensorDictBase) -> Tensor:
        """Reduce ``[*B, S]`` source by source, weighted as the learner weights its sources.

        Of drawn sources a mean is that over all draws of ``value / share of rows where the source lives``, whose
        expectation is the weighted sum of the sources' own means.
        """
        weight = experience.get("source_weight", None)
        if weight is not None and self.reduction == "mean":
            values = weight * values
        masks = [None] * values.shape[-1] if mask is None else mask.unbind(-1)
        reduced = [self._reduce(*column) for column in zip(values.unbind(-1), masks, strict=True)]
        columns = torch.stack(reduced, -1)
        if self.reuse is not None and self._learner is not None and not self.sampled:
            shares = self.reuse.matrix.index_select(0, self._learner.index).index_select(1, self._learner.sources)
            columns = columns * shares.squeeze(0)
        return columns if self.reduction == "none" else columns.sum(-1)


class NaturalGradientOptions(SequentialOptions, total=False):
    """Options of natural-gradient losses; meanings and defaults are those of :class:`NaturalGradientLoss`."""

    max_kl: float
    damping: float
    num_iterations: int
    backtrack: float
    accept_ratio: float
    num_backtracks: int


class NaturalGradientLoss(SequentialLoss):
    """Sequential loss whose agents move by natural gradients; abstract: HATRPO and OATRPO are made of it.

    An agent's turn is one call of :meth:`step` on the whole batch instead of epochs of minibatches; the critic's is as
    for any loss::

        for turn in loss.turns(batch):
            if turn != "critic":
                loss.step(batch)
                continue
            for minibatch in minibatches(batch): ...

    Args:
        max_kl: radius of the trust region (the papers' delta), in nats; a buffer, assign to it to schedule it.
        damping: added to the diagonal of the Fisher matrix.
        num_iterations: of the conjugate gradient.
        backtrack, accept_ratio, num_backtracks: of the line search, see
            :func:`~torchrl_marl.objectives.trust_region.backtracking_line_search`.
        reuse, sampled: see :class:`SequentialLoss`.
        **options: :class:`SequentialOptions`. By default the surrogate is the ratio itself, without an entropy bonus;
            all gains have one slope at ratio 1, others than the ratio act on the line search.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    max_kl: Tensor
    _schedulable_buffers = SequentialLoss._schedulable_buffers | {"max_kl"}

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        max_kl: float = 0.01,
        damping: float = 0.1,
        num_iterations: int = 10,
        backtrack: float = 0.8,
        accept_ratio: float = 0.5,
        num_backtracks: int = 10,
        reuse: ReuseMappingSampler | None,
        sampled: bool,
        **options: Unpack[SequentialOptions],
    ) -> None:
        if type(self) is NaturalGradientLoss:
            raise TypeError("NaturalGradientLoss is abstract: use HATRPOLoss, OATRPOLoss or a subclass.")
        check_at_least_0(damping=damping, accept_ratio=accept_ratio)
        if not 0 < max_kl < math.inf:
            raise ValueError(f"max_kl must be a number above 0; got {max_kl}.")
        if not 0 < backtrack < 1:
            raise ValueError(f"backtrack must be between 0 and 1; got {backtrack}.")
        if min(num_iterations, num_backtracks) < 1:
            found = f"{num_iterations} and {num_backtracks}"
            raise ValueError(f"num_iterations and num_backtracks must be at least 1; got {found}.")
        options.setdefault("gain", ratio_gain)
        options.setdefault("entropy_coeff", 0.0)
        super().__init__(actor_network, critic_network, reuse=reuse, sampled=sampled, **options)
        self._take_step = partial(
            trust_region_step,
            damping=damping,
            num_iterations=num_iterations,
            backtrack=backtrack,
            accept_ratio=accept_ratio,
            num_backtracks=num_backtracks,
        )
        self.register_coeff_buffer("max_kl", max_kl, device=self.ratio_low.device)

    def check_loop(
        self, frames_per_batch: int, num_envs: int, minibatch_size: int, chunk_length: int | None = None
    ) -> None:
        """Refuse what :meth:`phases` could not use, and what a step cannot be taken on."""
        super().check_loop(frames_per_batch, num_envs, minibatch_size, chunk_length)
        if world_size() > 1:
            raise ValueError(f"{type(self).__name__} takes steps on a whole batch: it learns in one process.")
        if self.reduction != "mean":
            raise ValueError(f"loss.reduction must be mean, as a natural step compares means; got {self.reduction}.")

    @property
    def takes_steps(self) -> bool:
        """Whether it is an agent's turn: it moves by :meth:`step`."""
        return isinstance(self.turn, int)

    @set_recurrent_mode(True)
    def step(self, tensordict: TensorDictBase) -> TensorDict:
        """Move the actor of the agent whose turn it is, in place, by one confirmed natural-gradient step.

        Args:
            tensordict: the whole batch, any shape ``[B]``.

        Returns:
            What ``forward`` returns after the step and, of the step, ``step_fraction`` (0: none was good enough),
            ``improvement``, ``expected_improvement``, ``kl`` and ``grad_norm``. All detached.

        Raises:
            ValueError: outside of an agent's turn, or if ``reduction`` is not ``"mean"``.
        """
        if not isinstance(self.turn, int):
            raise ValueError(f"A step is an agent's, but the turn is {self.turn!r}: call it within turns(batch).")
        if self.reduction != "mean":
            raise ValueError(f"A step compares means: it needs reduction='mean', not {self.reduction!r}.")
        learner = cast("_Learner", self._learner)
        policy, device = learner.policy, self.ratio_low.device
        devices = [device] if device.type == "cuda" else []
        experience, entropy_mask = self._experience(self._with_advantage(tensordict), learner)
        with torch.no_grad(), self._parameters_of("actor_network"):
            old = policy.get_dist(experience.copy())

        def evaluate() -> tuple[Tensor, Tensor]:
            with torch.random.fork_rng(devices):  # a sampled entropy has the same noise at all parameters
                losses, new = self._actor_losses(experience, policy, entropy_mask)
            kl = policy_kl(old, new)
            mask = self._mask(experience, kl.shape)
            return -losses["loss_objective"] - losses["loss_entropy"], self._over_sources(kl, mask, experience)

        step = self._take_step(self.agent_parameters(self.turn), evaluate, max_kl=self.max_kl)
        with torch.no_grad():
            losses, _ = self._actor_losses(experience, policy, entropy_mask)
        return TensorDict({**losses, **step}).detach()


class _Learner(NamedTuple):
    """Whose turn it is, without Python numbers, for which a compiler would start anew."""

    policy: ProbabilisticTensorDictSequential
    index: Tensor  # [1]
    sources: Tensor  # [S], ascending


def _take_each(agents: Tensor, *, dim: int) -> Callable[[Tensor], Tensor]:
    """Return the function that selects the slots of some agents, ``[*B, N, ...]`` to ``[*B, S, ...]``."""
    return lambda values: values if len(agents) == values.shape[dim] else values.index_select(dim, agents)


def _take_along(agents: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function that selects the slot ``agents`` of each row, ``[*B, N, ...]`` to ``[*B, 1, ...]``."""

    def take(values: Tensor) -> Tensor:
        index = agents.reshape(agents.shape + (1,) * (values.ndim - agents.ndim))
        return values.take_along_dim(index, agents.ndim - 1)

    return take
