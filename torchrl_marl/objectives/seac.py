"""SEAC: independent actor-critics that learn from the experience of all agents."""

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
from torchrl_marl.signatures import check_at_least_0, check_choice

__all__ = ["SEACLoss"]


class SEACLoss(ClipLoss):
    """Shared experience actor-critic: A2C for each agent on its own and the other agents' importance-weighted data.

        loss_objective = -mean_i sum_k c_ik mean(r_ik A_ik),   A_ik = R_k - V_i(o_k), no gradient
        loss_critic    =  critic_coeff mean_i sum_k w_ik mean(distance(V_i(o_k), R_k))
        r_ik = pi_i(a_k|o_k) / pi_k_old(a_k|o_k)
        c_ii = 1, c_ik = sharing_coeff;   w_ii = 1, w_ik = sharing_coeff r_ik, no gradient

    for each learner i and source k. Terms of other agents are summed, not averaged. Means run over steps and live
    sources; for a critic's own values (``i = k``), over all steps. The gradient equals that of the paper's
    ``c_ik r_ik log pi_i(a_k|o_k) A_ik`` with a constant weight; on an agent's own on-policy data it equals that of A2C.
    The ratio form takes any gain: ``gain=clip_gain`` gives shared experience PPO, which allows several epochs. Without
    a clip, collect new data after each update.

    ``value_target`` is the return ``R``, bootstrapped with the critic of the agent that collected it. The paper's
    ``t``-step return corresponds to a batch ``[B, t]`` and ``loss.make_value_estimator(gamma=0.99, lmbda=1)``.
    ``advantage`` is not read.

    Reference: Christianos et al., Shared Experience Actor-Critic for Multi-Agent Reinforcement Learning, NeurIPS 2020,
    https://arxiv.org/abs/2006.07169. Returns follow the authors' code, which bootstraps with the source's critic (the
    paper uses the learner's).

    Args:
        actor_network: decentralised feed-forward policy with a network for each agent, without an agent id as input.
        critic_network: critic with a network for each agent, which sees the agent's own observation:
            ``make_critic(env, observes="observation", share_parameters=False)``.
        sharing_coeff: weight of other agents' experience (the paper's lambda); 0 is independent A2C.
        **options: :class:`~torchrl_marl.objectives.ratio.ClipOptions`, by default the paper's: the gain is the ratio
            itself, ``critic_coeff=0.5``, ``loss_critic_type="l2"`` and ``normalize_advantage=False``; if true, ``A_ik``
            is standardised for each learner and source. ``clip_value`` clips values of an agent's own observations
            around the stored values; values of other agents' observations are not stored and not clipped.

    Raises:
        ValueError: if agents share parameters, actor and critic differ in the number of agents, or an option is out of
            its range.

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
            raise ValueError(
                "SEACLoss needs networks without a memory: a stored state is valid for one agent's network."
            )
        check_at_least_0(sharing_coeff=sharing_coeff)
        check_choice("precision", options.get("precision", "float32"), ("float32",))
        if "normalize_advantage_exclude_dims" in options:
            raise ValueError("SEACLoss normalises advantages for each pair of agents only.")
        paper: ClipOptions = {"gain": ratio_gain, "critic_coeff": 0.5, "loss_critic_type": "l2"}
        own: ClipOptions = {**paper, "normalize_advantage": False, **options}
        own["normalize_advantage_exclude_dims"] = (-2, -1)
        super().__init__(actor_network, critic_network, **own)
        self.sharing_coeff = sharing_coeff
        # plain lists: these modules only wrap the registered networks and own no parameters
        self._policies = [agent_policy(actor_network, agent) for agent in range(agents)]
        self._critics = [agent_policy(critic_network, agent) for agent in range(agents)]  # pyright: ignore

    def _computed_keys(self) -> list[str]:
        return [key for key in OUT_KEYS if key != "explained_variance"]

    @dispatch  # pyright: ignore[reportArgumentType]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses and detached diagnostics.

        Args:
            tensordict: a batch of any shape ``[B]``, not modified.

        Returns:
            A TensorDict with ``loss_objective``, ``loss_entropy`` and ``loss_critic`` (back-propagate their sum) and
            detached diagnostics: ``entropy`` and, for the ratios of all learners to all sources, ``kl_approx`` (the
            divergence between agents), ``clip_fraction``, ``min_ratio`` and ``max_ratio``.

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
        if (
            old_value is not None
        ):  # a learner's values of other agents' observations are not stored, so they are not clipped
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
