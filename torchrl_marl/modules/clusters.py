"""Clusters of similar agents, found from an encoding of the effects of their actions.

Selective parameter sharing (SePS): collect transitions while all agents follow one policy, encode the agents, cluster
the encodings, and let the agents of a cluster share a network: ``make_actor(env, share_parameters=clusters)``.

Reference: Christianos et al., Scaling Multi-Agent Reinforcement Learning with Selective Parameter Sharing, ICML 2021,
https://arxiv.org/abs/2102.07475.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional
from torchrl.modules import MLP

from torchrl_marl.extras import import_extra
from torchrl_marl.modules.spec import GroupSpec

__all__ = ["AgentAutoencoder", "cluster_agents", "encode_agents"]


class AgentAutoencoder(nn.Module):
    """Variational autoencoder that encodes agents by the outcomes of their actions.

        q(z|i) = N(mean_i, diag(scale_i^2)),   outcome = decoder(z, situation)
        loss = |outcome - (o', r)|^2 + kl_coeff KL(q(z|i) || N(0, I)),   situation = (o, a)

    The encoder sees only the agent's one-hot index, so agents with the same outcomes are encoded close to each other.

    Reference: SePS, section 4 and Fig. 2, with the authors' sum of squared errors as likelihood.

    Args:
        num_agents: N.
        situation_size: size of the concatenated observation and action.
        outcome_size: size of the concatenated next observation and reward.
        latent_size: dimensions of the encoding.
        kl_coeff: weight of the divergence from the prior.

    Example:
        >>> autoencoder = AgentAutoencoder(num_agents=3, situation_size=6, outcome_size=5)
        >>> autoencoder(torch.tensor([0, 2]), torch.zeros(2, 6), torch.zeros(2, 5)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        num_agents: int,
        situation_size: int,
        outcome_size: int,
        *,
        latent_size: int = 10,
        kl_coeff: float = 1e-4,
    ) -> None:
        super().__init__()
        self.num_agents, self.kl_coeff = num_agents, kl_coeff
        self.encoder = MLP(num_agents, 2 * latent_size, num_cells=[64], activation_class=nn.ReLU)
        sizes = latent_size + situation_size, outcome_size
        self.decoder = MLP(*sizes, num_cells=[64, 64], activation_class=nn.ReLU)

    def encode(self, agent: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the encodings of agent indices, ``[*B]`` to ``[*B, latent_size]``."""
        one_hot = functional.one_hot(agent, self.num_agents).to(torch.get_default_dtype())
        mean, log_variance = self.encoder(one_hot).chunk(2, -1)
        return mean, (log_variance / 2).exp()

    def forward(self, agent: Tensor, situation: Tensor, outcome: Tensor) -> Tensor:
        """Return the loss of each row, ``[*B]``, with one sample of the agent's encoding."""
        mean, scale = self.encode(agent)
        latent = mean + scale * torch.randn_like(mean)
        predicted = self.decoder(torch.cat([latent, situation], -1))
        divergence = (mean.square() + scale.square() - 1).sum(-1) / 2 - scale.log().sum(-1)  # from N(0, I)
        return (predicted - outcome).square().sum(-1) + self.kl_coeff * divergence


@torch.enable_grad()
def encode_agents(
    tensordict: TensorDictBase,
    shape: GroupSpec,
    *,
    latent_size: int = 10,
    kl_coeff: float = 1e-4,
    num_epochs: int = 10,
    minibatch_size: int = 128,
    lr: float = 3e-4,
) -> Tensor:
    """Train an autoencoder on transitions and return the mean encodings of the agents.

    Defaults are the authors', who collect 200,000 steps.

    Args:
        tensordict: transitions, any batch shape ``[*B]``, with the group's observations, actions and optionally
            ``"mask"`` (live agents; all are alive by default) and, under ``"next"``, observations and rewards.
        shape: shape of the group.
        latent_size: see :class:`AgentAutoencoder`.
        kl_coeff: see :class:`AgentAutoencoder`.
        num_epochs: passes over the data.
        minibatch_size: transitions of single agents in a minibatch.
        lr: learning rate of Adam.

    Returns:
        ``[N, latent_size]``

    Raises:
        KeyError: if an entry is missing.
        ValueError: if a size or the number of epochs is below 1.
    """
    if min(latent_size, num_epochs, minibatch_size) < 1:
        found = f"{latent_size}, {num_epochs} and {minibatch_size}"
        raise ValueError(f"latent_size, num_epochs and minibatch_size must be at least 1; got {found}.")
    name = shape.name
    observation, action = tensordict[name, "observation"], tensordict[name, "action"]
    action = action if shape.num_actions is None else functional.one_hot(action, shape.num_actions).to(observation)
    outcome = [tensordict["next", name, key] for key in ("observation", "reward")]
    agents = torch.arange(shape.num_agents, device=observation.device)
    live = tensordict.get((name, "mask"), torch.ones_like(observation[..., 0], dtype=torch.bool))
    columns = agents.expand(live.shape), torch.cat([observation, action], -1), torch.cat(outcome, -1)
    rows = [column[live] for column in columns]
    sizes = [column.shape[-1] for column in columns[1:]]
    autoencoder = AgentAutoencoder(shape.num_agents, *sizes, latent_size=latent_size, kl_coeff=kl_coeff)
    autoencoder.to(observation.device)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=lr)
    for _ in range(num_epochs):
        for chosen in torch.randperm(len(rows[0])).split(minibatch_size):
            autoencoder(*(column[chosen] for column in rows)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return autoencoder.encode(agents)[0].detach()


def cluster_agents(
    encodings: Tensor,
    *,
    num_clusters: int | None = None,
    index: Literal["silhouette", "davies_bouldin"] = "silhouette",
    seed: int = 0,
) -> list[int]:
    """Group agents by k-means on their encodings.

    By default, the number of clusters between 2 and N - 1 with the best index is chosen; neither index is defined for a
    single cluster or for N clusters. SePS takes the lowest Davies-Bouldin index, the width of clusters over the
    distance between them. A cluster of one agent has no width, so in small teams this index separates similar agents.
    The silhouette, which is 0 for a cluster of one agent, does not.

    Args:
        encodings: ``[N, latent_size]``
        num_clusters: number of clusters, from 1 to N; ``None`` to let the index choose.
        index: index that chooses the number of clusters.
        seed: seed of the ten k-means starts, of which the best is kept.

    Returns:
        The cluster of each agent, numbered from 0 in the order of agents.

    Raises:
        ValueError: if ``num_clusters`` is out of its range, or is ``None`` for fewer than three agents, or the index is
            unknown.
        ImportError: without scikit-learn.

    Example:
        >>> cluster_agents(torch.tensor([[0.0, 0.1], [5.0, 5.0], [0.1, 0.0], [5.1, 5.0]]))  # doctest: +SKIP
        [0, 1, 0, 1]
    """
    cluster, metrics = (import_extra(f"sklearn.{name}", "seps") for name in ("cluster", "metrics"))
    costs = {
        "silhouette": lambda *found: -metrics.silhouette_score(*found),
        "davies_bouldin": metrics.davies_bouldin_score,
    }
    if index not in costs:
        raise ValueError(f"index must be one of {', '.join(costs)}; got {index!r}.")
    num_agents = len(encodings)
    if num_clusters is not None and not 1 <= num_clusters <= num_agents:
        raise ValueError(f"num_clusters must be from 1 to {num_agents}, the number of agents; got {num_clusters}.")
    if num_clusters is None and num_agents < 3:
        raise ValueError(f"With {num_agents} agents the number of clusters cannot be chosen: set num_clusters.")
    points = encodings.cpu().numpy()
    numbers = range(2, num_agents) if num_clusters is None else [num_clusters]
    candidates = [cluster.KMeans(number, n_init=10, random_state=seed).fit_predict(points) for number in numbers]
    best = min(candidates, key=lambda labels: costs[index](points, labels)) if len(candidates) > 1 else candidates[0]
    order = list(dict.fromkeys(best.tolist()))
    return [order.index(label) for label in best.tolist()]
