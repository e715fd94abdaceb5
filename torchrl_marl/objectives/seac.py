"""SEAC: independent actor-critics that all learn from everybody's experience."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from typing_extensions import Unpack

from torchrl_marl.modules.agent_networks import agent_policy, count_agents
from torchrl_marl.modules.protocols import Actor, Critic
from torchrl_marl.modules.recurrent import recurrent_state_keys
from torchrl_marl.objectives.masking import masked_mean, standardize, where_live
from torchrl_marl.objectives.ratio import OUT_KEYS, ClipLoss, ClipOptions, policy_entropy, ratio_diagnostics, require
from torchrl_marl.objectives.surrogates import ratio_gain
from torchrl_marl.signatures import check_at_least_0

__all__ = ["SEACLoss"]


class SEACLoss(ClipLoss):
    """Shared experience actor-critic: A2C for each agent, on its own experience and, reweighted, on all others'.

        loss_objective = -mean_i sum_k c_ik mean(r_ik A_ik),   A_ik = R_k - V_i(o_k), no gradient
        loss_critic    =  critic_coeff mean_i sum_k w_ik mean(distance(V_i(o_k), R_k))
        r_ik = pi_i(a_k|o_k) / pi_k_old(a_k|o_k)
        c_ii = 1, c_ik = sharing_coeff;   w_ii = 1, w_ik = sharing_coeff r_ik, no gradient

    for each learner i and source k. Other agents are summed, not averaged. Means run over steps and live sources, those
    of a critic's own values (``i = k``) over all steps. The gradient is that of the paper's
    ``c_ik r_ik log pi_i(a_k|o_k) A_ik`` with no gradient through its weight, and on an agent's own data, which are of
    its current policy, that of A2C. Written as a ratio, it takes any gain: with ``gain=clip_gain`` it is shared
    experience PPO, fit for several epochs. Without one take new data after each update.

    ``value_target`` is the return ``R``, bootstrapped with its own agent's critic. The paper's, of ``t`` steps, is that
    of a batch ``[B, t]`` and ``loss.make_value_estimator(gamma=0.99, lmbda=1)``. An ``advantage`` is not read.

    Reference: Christianos et al., Shared Experience Actor-Critic for Multi-Agent Reinforcement Learning, NeurIPS 2020,
    https://arxiv.org/abs/2006.07169, with the returns of the authors' code, for which the source's critic bootstraps
    (in the paper the learner's does).

    Args:
        actor_network: decentralised feed-forward policy with a network for each agent, which does not see an agent id.
        critic_network: one for each agent as well, of its own observation:
            ``make_critic(env, observes="observation", share_parameters=False)``.
        sharing_coeff: weight of others' experience (the paper's lambda); 0 is independent A2C.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`, by default the paper's: the gain is the ratio
            itself, ``critic_coeff=0.5``, ``loss_critic_type="l2"`` and ``normalize_advantage=False``; if set, ``A_ik``
            is standardised for each learner and source. ``clip_value`` holds an agent's values of its own observations
            to the stored ones; what it thought of other agents' is not stored.

    Raises:
        ValueError: if agents share parameters, actor and critic are for different numbers of agents, or an option is
            out of its range.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_marl.modules import GroupSpec, make_actor, make_critic
        >>> shape = GroupSpec("agents", num_agents=3, observation_size=8, num_actions=5)
        >>> actor = make_actor(shape, share_parameters=False)
        >>> critic = make_critic(shape, observes="observation", share_parameters=False)
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> with torch.no_grad():
        ...     data = actor(data).set("value_target", torch.ones(7, 3, 1))
        >>> sorted(key for key in SEACLoss(actor, critic)(data).keys() if key.startswith("loss_"))
        ['loss_critic', 'loss_entropy', 'loss_objective']
    """

    def __init__(
        self,
        actor_network: Actor,
        critic_network: Critic,
        *,
        sharing_coeff: float = 1.0,
        **options: Unpack[ClipOptions],
    ) -> None:
        agents, critics = count_agents(actor_network), count_agents(critic_network)
        if agents != critics:
            raise ValueError(f"Every agent needs a critic: there are {agents} agents, {critics} critics.")
        if recurrent_state_keys(actor_network) or recurrent_state_keys(critic_network):
            raise ValueError("SEACLoss takes networks without a memory: a state belongs to the network that wrote it.")
        check_at_least_0(sharing_coeff=sharing_coeff)
        if "normalize_advantage_exclude_dims" in options:
            raise ValueError("SEACLoss has one way to normalise advantages, for each pair of agents.")
        paper: ClipOptions = {"gain": ratio_gain, "critic_coeff": 0.5, "loss_critic_type": "l2"}
        own: ClipOptions = {**paper, "normalize_advantage": False, **options}
        own["normalize_advantage_exclude_dims"] = (-2, -1)
        super().__init__(actor_network, critic_network, **own)
        self.sharing_coeff = sharing_coeff
        # plain lists: other ways to run the networks, with nothing of their own to register
        self._policies = [agent_policy(actor_network, agent) for agent in range(agents)]
        self._critics = [agent_policy(critic_network, agent) for agent in range(agents)]  # pyright: ignore

    def _computed_keys(self) -> list[str]:
        return [key for key in OUT_KEYS if key != "explained_variance"]

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``; it is not changed.

        Returns:
            A TensorDict with ``loss_objective``, ``loss_entropy`` and ``loss_critic`` (back-propagate their sum) and,
            detached, ``entropy`` and, of the ratios of all learners to all sources, ``kl_approx`` (how far apart
            agents are), ``clip_fraction``, ``min_ratio`` and ``max_ratio``.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit, or stored log-probabilities carry gradients.
        """
        keys = self.tensor_keys
        known = keys.value_target in tensordict.keys(True)
        tensordict = tensordict.copy() if known else self._with_advantage(tensordict)
        returns = require(tensordict, keys.value_target)
        policies, log_ratios = zip(*(self._log_ratio(tensordict, policy) for policy in self._policies), strict=True)
        log_ratio = torch.stack(log_ratios, -2)  # [*B, learners, sources]
        shape = log_ratios[0].shape
        if returns.shape != (*shape, 1):
            raise ValueError(
                f"{keys.value_target!r} has shape {tuple(returns.shape)}: it must be a return for each agent, "
                f"{(*shape, 1)}."
            )
        old_value = None if self.clip_value is None else require(tensordict, keys.value).squeeze(-1)
        with self._parameters_of("critic_network"):
            values = [critic(tensordict.copy()).get(keys.value).squeeze(-1) for critic in self._critics]
            scale = self._value_scale()
        value, returns = torch.stack(values, -2), returns.squeeze(-1).unsqueeze(-2).expand_as(log_ratio)

        own = torch.eye(len(self._policies), dtype=torch.bool, device=log_ratio.device)
        mask, valid = self._mask(tensordict, shape), self._valid(tensordict, shape)
        pairs = torch.ones_like(log_ratio, dtype=torch.bool)
        if mask is not None:
            pairs = mask.unsqueeze(-2).expand_as(log_ratio)
            valued = pairs | own if valid is None else pairs | (own & valid.unsqueeze(-2))
            log_ratio = where_live(log_ratio, pairs)
            value, returns = where_live(value, valued), where_live(returns, valued)
        advantage = where_live(returns - value, pairs).detach()
        if self.normalize_advantage:
            advantage = standardize(advantage, pairs, exclude_dims=self.normalize_advantage_exclude_dims)
        gain = self._gain_of(log_ratio, advantage)
        gain = torch.where(own, gain, self.sharing_coeff * gain)
        if old_value is not None:  # what a learner thought of others' observations is not stored: it may move freely
            old_value = torch.where(own, old_value.unsqueeze(-2), value.detach())
        distance = self._value_distance(value, returns, old_value, scale)
        shared = self.sharing_coeff * log_ratio.detach().exp() * distance
        own_distance, shared = (distance * own).sum(-2), (shared * ~own).sum(-2)
        entropy = torch.stack([policy_entropy(policy) for policy in policies], -2).diagonal(dim1=-2, dim2=-1)
        return self._output(
            {
                "loss_objective": self._reduce(-gain.sum(-2), mask),
                "loss_entropy": -self.entropy_coeff * self._reduce(entropy, mask),
                "loss_critic": self.critic_coeff * (self._reduce(own_distance, valid) + self._reduce(shared, mask)),
                "entropy": masked_mean(entropy.detach(), mask),
                **ratio_diagnostics(log_ratio.detach(), pairs, self.ratio_low, self.ratio_high),
            }
        )
