"""Agents that are alike are found by what their actions bring about."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from torchrl_marl.modules import AgentAutoencoder, GroupSpec, cluster_agents, encode_agents

KINDS = [0, 1, 0, 1, 0]


def transitions(kinds, *, rows=400, actions=None):
    """Agents of one kind move alike by their actions and are paid alike for where they are; others otherwise."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    agents, moves, pay = len(kinds), normal(max(kinds) + 1, 4, 3), normal(max(kinds) + 1, 3)
    observation = normal(rows, agents, 3)
    action = torch.randint(4, (rows, agents), generator=generator) if actions is None else normal(rows, agents, actions)
    weights = torch.nn.functional.one_hot(action, 4).float() if actions is None else action
    following = torch.stack(
        [observation[:, i] + weights[:, i] @ moves[kind, :actions] for i, kind in enumerate(kinds)], 1
    )
    reward = (observation * pay[kinds]).sum(-1, keepdim=True)
    return TensorDict(
        {
            "agents": {"observation": observation, "action": action},
            "next": {"agents": {"observation": following, "reward": reward}},
        },
        batch_size=[rows],
    )


def shape_of(kinds, actions=None):
    space = (
        {"num_actions": 4} if actions is None else {"action_low": (-1.0,) * actions, "action_high": (1.0,) * actions}
    )
    return GroupSpec("agents", len(kinds), 3, **space)


@pytest.mark.parametrize("actions", [None, 2], ids=["categorical", "continuous"])
def test_agents_that_are_alike_land_in_one_cluster_and_others_apart(actions):
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    encodings = encode_agents(transitions(KINDS, actions=actions), shape_of(KINDS, actions), lr=1e-3)
    assert cluster_agents(encodings) == KINDS
    assert not encodings.requires_grad


def test_only_the_transitions_of_the_living_count():
    pytest.importorskip("sklearn")
    data = transitions([0, 1, 0])
    dead = torch.arange(400) % 2 == 0
    garbled = data.clone()
    garbled["next", "agents", "reward"][dead] = torch.nan
    garbled["agents", "mask"] = ~dead.unsqueeze(-1).expand(400, 3)
    encodings = []
    for rows in (garbled, data[~dead]):
        torch.manual_seed(0)
        encodings.append(encode_agents(rows, shape_of([0, 1, 0]), num_epochs=1))
    assert_close(*encodings)


def test_the_loss_is_the_papers_bound():
    torch.manual_seed(0)
    autoencoder = AgentAutoencoder(3, 4, 2, latent_size=5, kl_coeff=0.3)
    agent, situation, outcome = torch.tensor([2, 0]), torch.randn(2, 4), torch.randn(2, 2)
    mean, scale = autoencoder.encode(agent)
    torch.manual_seed(1)
    loss = autoencoder(agent, situation, outcome)
    torch.manual_seed(1)
    predicted = autoencoder.decoder(torch.cat([mean + scale * torch.randn(2, 5), situation], -1))
    posterior = torch.distributions.Normal(mean, scale)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1)
    assert_close(loss, (predicted - outcome).square().sum(-1) + 0.3 * divergence)


def test_a_missing_entry_is_named():
    data = transitions([0, 1]).exclude(("next", "agents", "reward"))
    with pytest.raises(KeyError, match="reward"):
        encode_agents(data, shape_of([0, 1]))


PAIRS = torch.tensor([[0.0, 0.1], [5.0, 5.0], [0.1, 0.0], [5.1, 5.0]])


def test_clusters_are_numbered_in_the_order_of_agents_and_may_be_as_many_as_these():
    pytest.importorskip("sklearn")
    for seed in range(3):
        assert cluster_agents(PAIRS, seed=seed) == [0, 1, 0, 1]
        assert cluster_agents(PAIRS.flip(0), seed=seed) == [0, 1, 0, 1]
        assert cluster_agents(PAIRS, num_clusters=1, seed=seed) == [0, 0, 0, 0]
        assert cluster_agents(PAIRS, num_clusters=4, seed=seed) == [0, 1, 2, 3]


def test_the_index_of_the_paper_favours_clusters_of_one_agent():
    # two pairs, 7 apart: widths (0.07 + 0.05) / 7, on average over clusters; with one pair split that is 0.07 / 7
    pytest.importorskip("sklearn")
    assert cluster_agents(PAIRS, index="davies_bouldin") in ([0, 1, 2, 1], [0, 1, 0, 2])


def test_a_crowd_falls_into_its_clusters():
    pytest.importorskip("sklearn")
    crowd = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)) / 10 + torch.arange(30).unsqueeze(-1) % 3
    assert cluster_agents(crowd) == [0, 1, 2] * 10


@pytest.mark.parametrize(
    ("agents", "options", "message"),
    [
        (4, {"num_clusters": 5}, "from 1 to 4.*got 5"),
        (4, {"num_clusters": 0}, "from 1 to 4.*got 0"),
        (2, {}, "2 agents the number of clusters cannot be chosen"),
        (4, {"index": "elbow"}, "silhouette, davies_bouldin; got 'elbow'"),
    ],
)
def test_what_cannot_be_asked_for_is_named(agents, options, message):
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=message):
        cluster_agents(PAIRS[:agents], **options)


@pytest.mark.parametrize("option", ["latent_size", "num_epochs", "minibatch_size"])
def test_nothing_is_encoded_in_no_dimension_epoch_or_minibatch(option):
    with pytest.raises(ValueError, match=f"{option}.* must be at least 1; got .*0"):
        encode_agents(transitions(KINDS, actions=None), shape_of(KINDS, None), **{option: 0})
