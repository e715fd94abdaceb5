"""Reuse mappings: divergences on the sources' data, Eq. (9), named schemes, draws."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch.distributions import Categorical
from torch.testing import assert_close

from tests.objectives.loss_factories import AGENTS, SPACES, make_batch, make_networks
from torchrl_marl.collectors import ReuseMappingSampler
from torchrl_marl.modules import agent_policy
from torchrl_marl.objectives.divergences import pairwise_kl, policy_kl
from torchrl_marl.objectives.reuse import fading_reuse_matrix, fixed_reuse_matrix, gated_reuse_matrix

VECTORS = json.loads((Path(__file__).parents[1] / "objectives" / "off_agent_vectors.json").read_text())


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def vector_divergences(reduction):
    """Linear policies, every one on the observations of all: ``logits[i] = obs @ W[i].T``."""
    logits = torch.einsum("teno,iao->itena", float64(VECTORS["obs"]), float64(VECTORS["W_old"]))
    own = Categorical(logits=torch.stack([logits[i, :, :, i] for i in range(3)], -2))
    mask = float64(VECTORS["active"]).bool()
    return pairwise_kl(own, [Categorical(logits=rows) for rows in logits], mask, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_divergences_match_the_reference_vectors(reduction):
    assert_close(vector_divergences(reduction), float64(VECTORS[f"KL{reduction}"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", VECTORS["reuse_matrices"], ids=lambda c: f"{c['reduction']}-{c['lam']}-{c['sigma']}")
def test_matrices_match_the_reference_vectors(case):
    kl = vector_divergences(case["reduction"])
    matrix = gated_reuse_matrix(kl, own_weight=case["lam"], kl_threshold=case["sigma"])
    assert_close(matrix, float64(case["M"]), rtol=0, atol=1e-9)


def test_a_divergence_is_taken_under_the_source_on_the_sources_live_rows():
    actor, _ = make_networks("masked", share_parameters=False)
    data = make_batch(actor, "masked", live=0.6)
    own = actor.get_dist(data.clone())
    others = [agent_policy(actor, agent).get_dist(data.clone()) for agent in range(AGENTS)]
    kl = pairwise_kl(own, others, data["agents", "mask"])
    for learner in range(AGENTS):
        for source in range(AGENTS):
            rows = data["agents", "mask"][:, source]
            expected = policy_kl(own, others[learner])[rows, source].mean()
            assert_close(kl[learner, source], expected)
    assert_close(kl.diagonal(), torch.zeros(AGENTS), rtol=0, atol=1e-6)
    assert not torch.isclose(kl, kl.T).fill_diagonal_(False).any()


def test_a_source_without_a_live_row_is_infinitely_far():
    policy = Categorical(torch.full((4, 2, 3), 1 / 3))
    mask = torch.tensor([True, False]).expand(4, 2)
    for reduction in ("mean", "max"):
        assert torch.equal(
            pairwise_kl(policy, [policy, policy], mask, reduction=reduction),
            torch.tensor([[0.0, torch.inf], [0.0, torch.inf]]),
        )
    # so that nobody counts on it, and it may not count on itself less than usual
    matrix = gated_reuse_matrix(torch.tensor([[0.0, torch.inf], [0.0, torch.inf]]))
    assert_close(matrix, torch.tensor([[1.0, 0.0], [0.3, 0.7]]))


@pytest.mark.parametrize("own_weight", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("kl_threshold", [0.0, 0.3, 10.0])
def test_rows_sum_to_one_and_nobody_falls_below_its_own_weight(own_weight, kl_threshold):
    kl = torch.rand(6, 6).fill_diagonal_(0)
    matrix = gated_reuse_matrix(kl, own_weight=own_weight, kl_threshold=kl_threshold)
    assert_close(matrix.sum(-1), torch.ones(6))
    assert (matrix.diagonal() >= own_weight).all()
    if own_weight < 1:
        assert torch.equal(matrix > 0, kl <= kl_threshold)
    else:
        assert torch.equal(matrix, torch.eye(6))


def test_identical_agents_share_by_index():
    # the paper's "own" is a divergence of zero, which would make rows of three agents sum to 2.1
    assert_close(gated_reuse_matrix(torch.zeros(3, 3)), torch.full((3, 3), 0.15).fill_diagonal_(0.7))


def test_a_source_at_the_threshold_itself_is_close():
    matrix = gated_reuse_matrix(torch.tensor([[0.0, 0.25], [0.2500001, 0.0]]), kl_threshold=0.25)
    assert_close(matrix, torch.tensor([[0.7, 0.3], [0.0, 1.0]]))


def test_shares_fade_from_those_of_like_agents_to_none():
    """Halfway to the threshold a source has half of its share; who has no source left learns from itself alone."""
    kl = torch.tensor([[0.0, 0.0, 0.0], [0.05, 0.0, 0.1], [math.inf, 0.2, 0.0]])
    expected = [[0.7, 0.15, 0.15], [0.075, 0.925, 0.0], [0.0, 0.0, 1.0]]
    assert_close(fading_reuse_matrix(kl, own_weight=0.7, kl_threshold=0.1), torch.tensor(expected))
    alike = torch.zeros(4, 4)
    assert_close(fading_reuse_matrix(alike, own_weight=0.4), gated_reuse_matrix(alike, own_weight=0.4))
    with pytest.raises(ValueError, match="kl_threshold must be above 0"):
        fading_reuse_matrix(kl, kl_threshold=0.0)


def test_the_sampler_asks_its_gate():
    actor, _ = make_networks("categorical", share_parameters=False)
    batch = make_batch(actor, "categorical", (20,), live=1.0)
    sampler = ReuseMappingSampler(AGENTS, own_weight=0.5, kl_threshold=50.0, gate=fading_reuse_matrix)
    sampler.update(actor, batch)
    plain = ReuseMappingSampler(AGENTS, own_weight=0.5, kl_threshold=50.0)
    plain.update(actor, batch)
    assert (sampler.matrix.diagonal() > plain.matrix.diagonal()).all()  # policies are close, but not alike
    assert_close(sampler.matrix.sum(-1), torch.ones(AGENTS))


def test_named_schemes_are_those_of_the_maze():
    # order red, black, blue
    assert torch.equal(fixed_reuse_matrix("NR", 4), torch.eye(4))
    assert_close(fixed_reuse_matrix("AR", 4), torch.full((4, 4), 0.25))
    red_black = torch.tensor([[0.6, 0.4, 0], [0.4, 0.6, 0], [0, 0, 1.0]])
    black_blue = torch.tensor([[1.0, 0, 0], [0, 0.6, 0.4], [0, 0.4, 0.6]])
    assert_close(fixed_reuse_matrix("UR", 3, own_weight=0.6), red_black)
    assert_close(fixed_reuse_matrix("RR", 3, own_weight=0.6), black_blue)


def test_a_matrix_may_be_given_as_numbers():
    rows = [[0.5, 0.5], [0, 1]]
    assert torch.equal(fixed_reuse_matrix(rows, 2), torch.tensor(rows))
    assert torch.equal(ReuseMappingSampler(2, reuse_matrix=torch.tensor(rows)).matrix, torch.tensor(rows))


@pytest.mark.parametrize("space", SPACES)
def test_the_sampler_follows_the_policies(space):
    actor, _ = make_networks(space, share_parameters=False)
    data = make_batch(actor, space, (4, 3), live=0.8)
    others = [agent_policy(actor, agent).get_dist(data.clone()) for agent in range(AGENTS)]
    kl = pairwise_kl(actor.get_dist(data.clone()), others, data["agents", "mask"])
    threshold = kl[~torch.eye(AGENTS, dtype=torch.bool)].median().item()  # some are close, some are not
    sampler = ReuseMappingSampler(AGENTS, own_weight=0.6, kl_threshold=threshold)
    before = data.clone()
    sampler.update(actor, data, data["agents", "mask"])
    assert (data == before).all()
    assert_close(sampler.matrix, gated_reuse_matrix(kl, own_weight=0.6, kl_threshold=threshold))
    for agent in range(AGENTS):
        assert sampler.sources(agent) == tuple(torch.where(sampler.matrix[agent] > 0)[0].tolist())
    assert not sampler.matrix.requires_grad


def test_a_sample_of_rows_is_enough():
    actor, _ = make_networks("categorical", share_parameters=False)
    rows = make_batch(actor, "categorical", (2,), live=1.0)
    data = torch.cat([rows] * 50)
    matrices = []
    for num_rows in (99, 100, 101):
        sampler = ReuseMappingSampler(AGENTS, kl_threshold=0.5, num_rows=num_rows)
        sampler.update(actor, data, data["agents", "mask"])
        matrices.append(sampler.matrix)
    assert_close(matrices[0], matrices[1])
    assert_close(matrices[1], matrices[2], rtol=0, atol=0)
    state = torch.get_rng_state()
    sampler.update(actor, data)  # all rows: nothing is drawn
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_a_sample_come_from_the_whole_batch():
    # one source lives in the first half of the rows only, another one in the second half: a sample has seen both
    actor, _ = make_networks("categorical", share_parameters=False)
    data = make_batch(actor, "categorical", (200,))
    mask = torch.ones(200, AGENTS, dtype=torch.bool)
    mask[100:, 1] = mask[:100, 2] = False
    sampler = ReuseMappingSampler(AGENTS, kl_threshold=100.0, num_rows=30)
    sampler.update(actor, data, mask)
    assert_close(sampler.matrix, torch.full((AGENTS, AGENTS), 0.15).fill_diagonal_(0.7))


@pytest.mark.parametrize("options", [{"own_weight": 1.0}, {"reuse_matrix": "AR"}], ids=str)
def test_a_fixed_mapping_needs_no_data(options):
    sampler = ReuseMappingSampler(3, **options)
    before = sampler.matrix.clone()
    sampler.update(None, None)
    assert torch.equal(sampler.matrix, before)


def test_draws_have_the_frequencies_of_the_matrix():
    matrix = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0], [0.9, 0.0, 0.1]])
    draws = ReuseMappingSampler(3, reuse_matrix=matrix).sample((200, 50))
    assert draws.shape == (200, 50, 3)
    frequencies = torch.stack([(draws == source).float().mean((0, 1)) for source in range(3)], -1)
    assert_close(frequencies, matrix, rtol=0, atol=0.025)  # five standard deviations of 10,000 draws
    assert torch.equal(frequencies == 0, matrix == 0)


def test_an_agent_is_among_its_sources_even_when_it_learns_from_others_only():
    assert ReuseMappingSampler(2, reuse_matrix=[[0.0, 1.0], [0.0, 1.0]]).sources(0) == (0, 1)


def test_the_matrix_is_part_of_the_state(tmp_path):
    actor, _ = make_networks("categorical", share_parameters=False)
    sampler = ReuseMappingSampler(AGENTS, kl_threshold=10.0)
    sampler.update(actor, make_batch(actor, "categorical"))
    torch.save(sampler.state_dict(), tmp_path / "sampler.pt")
    other = ReuseMappingSampler(AGENTS)
    other.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    assert torch.equal(other.matrix, sampler.matrix)
    assert (other.matrix > 0).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"own_weight": 0.0}, r"own_weight must be in \(0, 1\], got 0.0"),
        ({"own_weight": 1.1}, r"own_weight must be in \(0, 1\], got 1.1"),
        ({"kl_threshold": -0.1}, "kl_threshold must be at least 0, got -0.1"),
        ({"kl_threshold": float("nan")}, "kl_threshold must be at least 0, got nan"),
        ({"kl_reduction": "median"}, "kl_reduction must be mean or max; got 'median'"),
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"reuse_matrix": "RS"}, "one of NR, AR, UR, RR; got 'RS'"),
        ({"reuse_matrix": [[1.0, 0.0], [0.0, 1.0]]}, r"must be \[4, 4\], got \(2, 2\)"),
        ({"reuse_matrix": torch.full((4, 4), 0.3)}, "rows that sum to 1"),
        ({"reuse_matrix": torch.eye(4) + torch.tensor([[0.5, -0.5, 0, 0]])}, "probabilities"),
        ({"reuse_matrix": "UR"}, r"UR is a scheme for 3 agents \(red, black, blue\), but the group has 4"),
    ],
    ids=str,
)
def test_values_out_of_range_raise(options, says):
    with pytest.raises(ValueError, match=says):
        ReuseMappingSampler(4, **options)


def test_divergences_that_are_not_square_raise():
    with pytest.raises(ValueError, match=r"\[agents, agents\], got \(2, 3\)"):
        gated_reuse_matrix(torch.zeros(2, 3))


def test_an_unknown_reduction_raises():
    policy = Categorical(torch.full((4, 1, 3), 1 / 3))
    with pytest.raises(ValueError, match="mean or max; got 'sum'"):
        pairwise_kl(policy, [policy], reduction="sum")


@pytest.mark.gpu
def test_the_sampler_works_on_a_gpu():
    actor, _ = make_networks("masked", share_parameters=False)
    data = make_batch(actor, "masked", live=0.8)
    sampler = ReuseMappingSampler(AGENTS, kl_threshold=0.5)
    sampler.update(actor, data, data["agents", "mask"])
    expected = sampler.matrix.clone()
    sampler, data = sampler.to("cuda"), data.to("cuda")
    assert isinstance(data, TensorDict)
    sampler.update(actor.to("cuda"), data, data["agents", "mask"])
    assert_close(sampler.matrix.cpu(), expected)
    assert sampler.sample((5,)).device.type == "cuda"
