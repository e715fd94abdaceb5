"""SEAC: independent actor-critics that all learn from everybody's experience."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch
from torchrl.objectives import distance_loss

from torchrl_marl.modules import agent_policy
from torchrl_marl.modules.agent_networks import count_agents
from torchrl_marl.modules.recurrent import recurrent_state_keys
from torchrl_marl.objectives.ratio import RatioLoss, clip_bounds, masked_mean, policy_entropy
from torchrl_marl.objectives.surrogates import ratio_gain

__all__ = ["SEACLoss"]


class SEACLoss(RatioLoss):
    """Shared experience actor-critic: A2C for each agent, on its own experience and, reweighted, on all others'.

        loss_objective = -mean_i sum_k w_ik mean(log pi_i(a_k|o_k) (R_k - V_i(o_k)))
        loss_critic    =  critic_coeff mean_i sum_k w_ik mean(distance(V_i(o_k), R_k))
        w_ii = 1,   w_ik = sharing_coeff pi_i(a_k|o_k) / pi_k_old(a_k|o_k)

    for each learner i and source k, where nothing flows back through ``w`` and ``R_k - V_i(o_k)``. Other agents are
    summed, not averaged. Means run over steps and live sources. Data are for one update: take new ones after each.

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
        entropy_coeff: weight of the entropy bonus, on own observations.
        critic_coeff, loss_critic_type, functional, reduction: as for every ratio loss, see
            :class:`~torchrl_marl.objectives.ratio.RatioLoss`.

    Raises:
        ValueError: if agents share parameters, actor and critic are for different numbers of agents, or an option is
            out of its range.

    Example:
        >>> from torchrl_marl.modules import GroupShape, make_actor, make_critic
        >>> shape = GroupShape("agents", num_agents=3, observation_size=8, num_actions=5)
        >>> actor = make_actor(shape, share_parameters=False)
        >>> critic = make_critic(shape, observes="observation", share_parameters=False)
        >>> data = TensorDict({"agents": {"observation": torch.zeros(7, 3, 8)}}, batch_size=7)
        >>> with torch.no_grad():
        ...     data = actor(data).set("value_target", torch.ones(7, 3, 1))
        >>> sorted(key for key in SEACLoss(actor, critic)(data).keys() if key.startswith("loss_"))
        ['loss_critic', 'loss_entropy', 'loss_objective']
    """

    out_keys = ("loss_objective", "loss_entropy", "loss_critic", "entropy", "mean_ratio", "max_ratio")  # pyright: ignore

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase,
        *,
        sharing_coeff: float = 1.0,
        entropy_coeff: float = 0.01,
        critic_coeff: float = 0.5,
        loss_critic_type: str = "l2",
        functional: bool = True,
        reduction: str = "mean",
    ) -> None:
        agents, critics = count_agents(actor_network), count_agents(critic_network)
        if agents != critics:
            raise ValueError(f"Every agent needs a critic: there are {agents} agents, {critics} critics.")
        if recurrent_state_keys(actor_network) or recurrent_state_keys(critic_network):
            raise ValueError("SEACLoss takes networks without a memory: a state belongs to the network that wrote it.")
        if not sharing_coeff >= 0:
            raise ValueError(f"sharing_coeff must be at least 0, got {sharing_coeff!r}.")
        low, high = clip_bounds(0.2)  # of no effect: nothing is clipped
        super().__init__(
            actor_network,
            critic_network,
            gain=ratio_gain,
            low=low,
            high=high,
            entropy_coeff=entropy_coeff,
            critic_coeff=critic_coeff,
            loss_critic_type=loss_critic_type,
            normalize_advantage=False,
            normalize_advantage_exclude_dims=(),
            functional=functional,
            reduction=reduction,
        )
        self.sharing_coeff = sharing_coeff
        # plain lists: other ways to run the networks, with nothing of their own to register
        self._policies = [agent_policy(actor_network, agent) for agent in range(agents)]
        self._critics = [agent_policy(critic_network, agent) for agent in range(agents)]  # pyright: ignore

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that ``forward`` reads."""
        return [key for key in super().in_keys if key != self.tensor_keys.advantage]

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``; it is not changed.

        Returns:
            A TensorDict with ``loss_objective``, ``loss_entropy`` and ``loss_critic`` (back-propagate their sum) and,
            detached, ``entropy`` and the mean and largest of the ratios of learners to other sources.

        Raises:
            KeyError: if an entry is missing.
            ValueError: if shapes do not fit, or stored log-probabilities carry gradients.
        """
        keys = self.tensor_keys
        if keys.value_target not in tensordict.keys(True):
            tensordict = self._with_advantage(tensordict)
        target = tensordict.get(keys.value_target)
        log_ratio = torch.stack([self._log_ratio(tensordict, policy)[1] for policy in self._policies], -2)
        with self._parameters_of("critic_network"):
            values = [critic(tensordict.copy()).get(keys.value).squeeze(-1) for critic in self._critics]
        value = torch.stack(values, -2)  # [*B, learners, sources], as log_ratio
        shape = (*log_ratio.shape[:-2], log_ratio.shape[-1])
        if target.shape != (*shape, 1):
            raise ValueError(
                f"{keys.value_target!r} must be a return for each agent, {(*shape, 1)}, got {target.shape}."
            )
        mask = self._mask(tensordict, torch.Size(shape))
        pairs = (
            torch.ones_like(log_ratio, dtype=torch.bool) if mask is None else mask.unsqueeze(-2).expand_as(log_ratio)
        )
        log_prob = log_ratio + tensordict.get(keys.sample_log_prob).unsqueeze(-2)
        log_prob, log_ratio, value = (torch.where(pairs, x, 0.0) for x in (log_prob, log_ratio, value))
        returns = torch.where(pairs, target.squeeze(-1).unsqueeze(-2), 0.0)

        same = torch.eye(len(self._policies), dtype=torch.bool, device=log_ratio.device)
        ratio = log_ratio.detach().exp()
        weight = torch.where(same, 1.0, self.sharing_coeff * ratio)
        gain = weight * log_prob * (returns - value).detach()
        distance = weight * distance_loss(value, returns, self.loss_critic_type)
        entropy = policy_entropy(self._log_ratio(tensordict)[0])
        others = pairs & ~same
        return TensorDict(
            {
                "loss_objective": self._reduce(-gain.sum(-2), mask),
                "loss_entropy": -self.entropy_coeff * self._reduce(entropy, mask),
                "loss_critic": self.critic_coeff * self._reduce(distance.sum(-2), mask),
                "entropy": masked_mean(entropy.detach(), mask),
                "mean_ratio": masked_mean(ratio, others),
                "max_ratio": ratio.where(others, 0.0).max(),
            }
        )
