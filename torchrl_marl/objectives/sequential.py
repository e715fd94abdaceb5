"""Base of methods that update agents sequentially: the turns, and the compound ratio of earlier updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode
from typing_extensions import Unpack

from torchrl_marl.distributed import any_process, broadcast_from_main, broadcast_state
from torchrl_marl.keys import sibling
from torchrl_marl.modules.agent_networks import agent_policy, count_agents
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.modules.recurrent import recurrent_state_keys
from torchrl_marl.objectives.masking import extremes, masked_mean, per_agent, where_live
from torchrl_marl.objectives.minibatches import Phase
from torchrl_marl.objectives.ratio import OUT_KEYS, ClipLoss, ClipOptions, ScoredBatch, require
from torchrl_marl.objectives.reuse import ReuseMappingSampler

__all__ = ["SequentialLoss", "Turn"]

Turn = int | Literal["critic"]


class SequentialLoss(ClipLoss):
    """Abstract ratio loss that trains one agent at a time; base of HAPPO, HATRPO, OAPPO and OATRPO.

        loss_objective of agent i = -sum_j M[i, j] mean(F_j gain(log r_j, A_j; low, high)) over rows where j is alive
        r_j = pi_i(a_j|o_j) / pi_j_old(a_j|o_j)
        F_j = product of pi_l(a_l|o_l) / pi_l_old(a_l|o_l) over the agents l != j that have had their turn

    Agent i, the learner, trains on the experience of its sources j; if M is the identity, only on its own. The compound
    ratio F is the change in probability of the other agents' actions due to the updates so far.

    A training loop takes turns from :meth:`turns` and trains on ``loss(minibatch)`` in each::

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

    One optimiser suffices. Every agent has separate leaf parameters (:class:`~torchrl_marl.modules.AgentNetworks`).
    Agents that are not being updated receive no gradient: their ``grad`` stays ``None``, which optimisers skip, so
    their parameters and optimiser state stay bit-identical. (Call ``zero_grad`` with its default,
    ``set_to_none=True``.) Agents act in one batched forward pass; in its turn, a learner's network evaluates all its
    sources in one pass.

    ``turns`` writes ``update_log_ratio`` ``[B, N]`` into the batch, which minibatches must carry: the log-ratio of
    agents that have been updated, zero for other agents, and zero everywhere before the first turn. Take minibatches
    from the batch within the turn, not from an earlier copy.

    Networks with a memory need sequences ``[*B, time]``, in ``turns`` and in ``forward``
    (:func:`~torchrl_marl.objectives.minibatches.split_into_chunks`). On its own sequences, a learner starts from the
    stored state. On another source's sequences it starts from zeros, as the stored state belongs to the source's
    network. With sampled sources, one source is drawn for each learner and sequence.

    In an agent's turn ``forward`` returns this agent's objective and entropy, in the critic's turn the critic's loss.
    Outside of turns (``loss.turn`` is ``None``) ``forward`` returns the losses of all agents, on their own experience,
    and the critic's: with the clip, MAPPO with a network for each agent.

    Keys, shapes and errors otherwise: :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Args:
        actor_network: decentralised policy with a network for each agent, such as
            ``make_actor(env, share_parameters=False)``.
        critic_network: one for all agents.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`.

    Attributes:
        reuse: sources of each agent's experience; ``None`` for its own experience only.
        sampled: draw one source for each learner and row instead of weighting all sources.

    Raises:
        ValueError: if agents share parameters, or an option is out of its range.
    """

    @dataclass
    class _AcceptedKeys(ClipLoss._AcceptedKeys):
        update_log_ratio: NestedKey = ("agents", "update_log_ratio")
        reuse_source: NestedKey = ("agents", "reuse_source")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    abstract = True
    trains_in_parts = True
    clipped_apart = "critic"

    def __init__(self, actor_network: Actor, critic_network: Critic, **options: Unpack[ClipOptions]) -> None:
        num_agents = count_agents(actor_network)
        super().__init__(actor_network, critic_network, **options)
        action = self.tensor_keys.action
        self.set_keys(
            update_log_ratio=sibling(action, "update_log_ratio"), reuse_source=sibling(action, "reuse_source")
        )
        self.reuse: ReuseMappingSampler | None = None
        self.sampled = False
        # plain lists: learners only wrap the registered actor's networks and own no parameters
        self._learners = [Learner(agent_policy(actor_network, agent), agent) for agent in range(num_agents)]
        self._learning: list[Learner] = []  # the agent whose turn it is
        self._state_keys = recurrent_state_keys(actor_network)
        self.turn = None

    @property
    def num_agents(self) -> int:
        """Number of agents, each with its own network."""
        return len(self._learners)

    @property
    def turn(self) -> Turn | None:
        """Selects the losses that ``forward`` returns: an agent's index, ``"critic"``, or ``None`` for all.

        :meth:`turns` sets the turn; a custom loop may set it directly.
        """
        return self._turn

    @turn.setter
    def turn(self, turn: Turn | None) -> None:
        if not (turn in (None, "critic") or (isinstance(turn, int) and 0 <= turn < self.num_agents)):
            raise ValueError(f"turn must be an agent from 0 to {self.num_agents - 1}, 'critic' or None; got {turn!r}.")
        self._turn: Turn | None = turn
        self._learning = []
        if isinstance(turn, int):
            self._learning = [learner := self._learners[turn]]
            learner.index = learner.index.to(self.ratio_low.device)
            learner.sources = learner.index.new_tensor((turn,) if self.reuse is None else self.reuse.sources(turn))

    @property
    def trained(self) -> nn.Module:
        """The learner, under names that all agents share, the critic, or, outside of turns, all parameters."""
        return self if self.turn is None else self._learner or self.critic_network

    @property
    def _learner(self) -> Learner | None:
        return self._learning[0] if self._learning else None

    def _computed_keys(self) -> list[str]:
        """Entries that ``forward`` computes in this turn."""
        critic = ["loss_critic", "explained_variance"]
        if self.turn == "critic":
            return critic
        keys = [key for key in OUT_KEYS if key not in critic]
        return [*keys, *critic] if self.turn is None else [*keys, "mean_compound_ratio", "max_compound_ratio"]

    def agent_parameters(self, agent: int) -> list[nn.Parameter]:
        """Return the parameters of one agent's policy, for example for a separate optimiser."""
        with self._parameters_of("actor_network"):
            return list(self._learners[agent].policy.parameters())

    def reuse_weights(self) -> dict[str, Tensor]:
        """Return ``reuse_i_j``, the weight of agent j's experience for agent i, for logs."""
        matrix = torch.eye(self.num_agents) if self.reuse is None else self.reuse.matrix.clone()
        return {f"reuse_{i}_{j}": weight for i, row in enumerate(matrix) for j, weight in enumerate(row)}

    def turns(self, tensordict: TensorDictBase, *, order: Sequence[int] | None = None) -> Iterator[Turn]:
        """Yield a turn for every agent, then one for the critic.

        After an agent's turn, the log-ratio of its new policy is computed over the whole batch. An agent is skipped if
        none of its sources has a live row in the batch.

        Args:
            tensordict: a batch of any shape ``[B]``; ``update_log_ratio`` (and ``reuse_source``) are written into it.
            order: order of the agents; by default a random order, drawn on each call.

        Yields:
            The current :attr:`turn`.

        Raises:
            ValueError: if the order is not a permutation of all agents.
        """
        order = broadcast_from_main(lambda: torch.randperm(self.num_agents).tolist()) if order is None else list(order)
        if sorted(order) != list(range(self.num_agents)):
            raise ValueError(f"order must name every agent from 0 to {self.num_agents - 1} once, got {order}.")
        keys = self.tensor_keys
        stored = require(tensordict, keys.sample_log_prob)
        mask = self._mask(tensordict, stored.shape)
        self._measure_reuse(tensordict, mask)
        if self.reuse is not None and self.sampled:
            rows = (*stored.shape[:-2], 1) if self._state_keys else stored.shape[:-1]
            tensordict.set(keys.reuse_source, self.reuse.sample(rows).expand(stored.shape))
        log_ratio = torch.zeros_like(stored)
        tensordict.set(keys.update_log_ratio, log_ratio)
        try:
            for agent in order:
                self.turn = agent
                learner = cast("Learner", self._learner)
                if mask is None or any_process(bool(mask.index_select(-1, learner.sources).any())):
                    yield agent
                    log_ratio = log_ratio.clone()
                    log_ratio[..., agent] = self._update_log_ratio(tensordict, learner, mask)
                    tensordict.set(keys.update_log_ratio, log_ratio)
            self.turn = "critic"
            yield "critic"
        finally:
            self.turn = None

    def _measure_reuse(self, tensordict: TensorDictBase, mask: Tensor | None) -> None:
        """Update the weights of all sources for the agents' current policies."""
        if self.reuse is not None:
            with self._parameters_of("actor_network"):
                self.reuse.update(self.actor_network, tensordict, mask)
            broadcast_state(self.reuse)  # measured on the first process's rows

    def phases(self, batch: TensorDictBase, *, chunk_length: int | None = None) -> Iterator[Phase]:
        """Yield a phase for every agent in random order, then one for the critic; see :meth:`turns`."""
        phase = self._phase(batch, chunk_length)
        for _ in self.turns(phase.rows):
            yield replace(phase, whole=self.takes_steps)

    def _rounding(self, batch: TensorDictBase) -> Tensor:
        """That of each agent's network by itself, which rounds otherwise than all of them in one pass."""
        return torch.stack([self._update_log_ratio(batch, learner, None) for learner in self._learners], -1)

    def metrics(self) -> dict[str, Tensor]:
        """Return ``reuse_i_j``, the weight of agent j's experience for agent i."""
        return self.reuse_weights()

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of the turn and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``, not modified.

        Returns:
            A TensorDict with ``out_keys``: the entries of :meth:`RatioLoss.forward` that belong to the turn and, in an
            agent's turn, the mean and the largest compound ratio.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit, or stored log-probabilities carry gradients.
        """
        if self._learner is not None:  # no branch on the agent's index, so one compiled graph serves all agents
            experience, entropy_mask = self._experience(self._with_advantage(tensordict), self._learner)
            losses, _ = self._actor_losses(experience, self._learner.policy, entropy_mask)
            return self._output(losses)
        if self.turn is None:
            return super().forward(tensordict)
        return self._output(self._critic_losses(self._with_advantage(tensordict)))

    def objective(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the learner's ``loss_objective`` over its sources ``[B, S]``; outside of turns, all agents'."""
        if self._learner is None:
            return super().objective(batch)
        gain = self._gain_of(batch.log_ratio, batch.advantage)
        compound, diagnostics = self._compound_ratio(batch)
        return self._over_sources(-compound * gain, batch.mask, batch.data), diagnostics

    def _compound_ratio(self, batch: ScoredBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Compound ratio of each source's row, ``[*B, S]``, and diagnostics."""
        compound = batch.data.get(self.tensor_keys.update_log_ratio).exp()
        _, largest = extremes(compound, batch.mask)
        return compound, {"mean_compound_ratio": masked_mean(compound, batch.mask), "max_compound_ratio": largest}

    def _own_keys(self) -> list[NestedKey]:
        """Entries that only sequential methods read."""
        keys = self.tensor_keys
        return [keys.update_log_ratio, keys.reuse_source] if self.sampled else [keys.update_log_ratio]

    def _experience(self, tensordict: TensorDictBase, learner: Learner) -> tuple[TensorDict, Tensor | None]:
        """Training data of ``learner``, with the group reduced to its sources ``[*B, S]``, and its entropy mask.

        The compound log-ratio of each source replaces the update log-ratio. The entropy is computed on the learner's
        own observations.
        """
        keys = self.tensor_keys
        stored = require(tensordict, keys.sample_log_prob)
        if self.sampled:
            source = require(tensordict, keys.reuse_source).index_select(-1, learner.index)
            take, own = _take_along(source), source == learner.index
        else:
            take, own = take_each(learner.sources, dim=stored.ndim - 1), None
            if len(learner.sources) > 1:
                own = (learner.sources == learner.index).expand(*stored.shape[:-1], -1)
        experience = self._observed(tensordict, take, own)
        for key in (keys.action, keys.sample_log_prob):
            experience.set(key, take(require(tensordict, key)))
        advantage = per_agent(tensordict.get(keys.advantage), stored.shape, keys.advantage)
        experience.set(keys.advantage, take(advantage).unsqueeze(-1))
        experience.set(keys.update_log_ratio, take(self._updates_of_others(tensordict)))
        mask = self._mask(tensordict, stored.shape)
        if mask is not None:
            live = take(mask)
            experience.set(keys.mask, live)
            own = None if own is None else own & live
            if self.sampled:  # a mean over live draws would underweight sources that are alive less often
                counts = mask.flatten(0, -2).sum(0).clamp(min=1)
                experience.set("source_weight", live.sum() / take(counts.expand(mask.shape)))
        return experience, own

    def _updates_of_others(self, tensordict: TensorDictBase) -> Tensor:
        """Compound log-ratio of the updates of all agents but the row's own, ``[*B, N]``; zero outside of turns."""
        keys = self.tensor_keys
        updates = tensordict.get(keys.update_log_ratio, torch.zeros_like(tensordict.get(keys.sample_log_prob)))
        return updates.sum(-1, keepdim=True) - updates

    @set_recurrent_mode(True)
    def _update_log_ratio(self, tensordict: TensorDictBase, learner: Learner, mask: Tensor | None) -> Tensor:
        """``log pi_new - log pi_old`` of an agent after its turn, ``[*B]``, zero where the agent is dead."""
        keys = self.tensor_keys
        stored = tensordict.get(keys.sample_log_prob)
        take = take_each(learner.index, dim=stored.ndim - 1)
        with torch.no_grad(), self._parameters_of("actor_network"):
            policy = self._distribution(learner.policy, self._observed(tensordict, take))
        log_ratio = policy.log_prob(take(tensordict.get(keys.action))) - take(stored)
        return where_live(log_ratio, None if mask is None else take(mask)).squeeze(-1)

    def _observed(
        self, tensordict: TensorDictBase, take: Callable[[Tensor], Tensor], own: Tensor | None = None
    ) -> TensorDict:
        """Inputs of a policy: the group's entries for some agents, with a memory only for the policy's own agent."""
        action = self.tensor_keys.action
        group = action[:-1] if isinstance(action, tuple) else ()
        entries = {}
        for key in self.actor_network.in_keys:
            value, path = tensordict.get(key, None), (key,) if isinstance(key, str) else key
            if value is not None:
                entries[key] = take(value) if path[: len(group)] == group else value
                if own is not None and key in self._state_keys:
                    entries[key] = torch.where(own.unsqueeze(-1), entries[key], 0.0)
        # the batch size of the data also includes agents if forward was given plain tensors
        return TensorDict(entries, batch_size=tensordict.get(self.tensor_keys.sample_log_prob).shape[:-1])

    def _over_sources(self, values: Tensor, mask: Tensor | None, experience: TensorDictBase) -> Tensor:
        """Reduce ``[*B, S]`` for each source and sum with the learner's weights.

        For sampled sources, the mean runs over all draws of ``value / share of rows where the source is alive``. Its
        expectation is the weighted sum of the sources' means.
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


class Learner(nn.Module):
    """An agent to update, its index ``[1]`` and sources ``[S]`` in tensors: numbers would trigger recompilation."""

    index: Tensor
    sources: Tensor

    def __init__(self, policy: Actor, agent: int) -> None:
        super().__init__()
        self.policy = policy
        self.register_buffer("index", torch.tensor([agent]))
        self.register_buffer("sources", torch.tensor([agent]))


def take_each(agents: Tensor, *, dim: int) -> Callable[[Tensor], Tensor]:
    """Return a function that selects some agents, ``[*B, N, ...]`` to ``[*B, S, ...]``."""
    return lambda values: values if len(agents) == values.shape[dim] else values.index_select(dim, agents)


def _take_along(agents: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that selects one agent per row, ``[*B, N, ...]`` to ``[*B, 1, ...]``."""

    def take(values: Tensor) -> Tensor:
        index = agents.reshape(agents.shape + (1,) * (values.ndim - agents.ndim))
        return values.take_along_dim(index, agents.ndim - 1)

    return take
