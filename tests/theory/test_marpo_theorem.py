"""MARPO's Theorem 1: f(x) = x - 1 - ln x as an estimate of the divergence that never is negative, and its interval.

The theorem is about f alone. It does not say that a clip at f's roots improves a policy; what follows from it for the
interval is tested here, and what does not is shown by an example.
"""

import pytest
import torch
from torch.testing import assert_close

from tests.theory.tabular import EXACT, Game, random_policies
from torchrl_marl.objectives import MAPPOLoss
from torchrl_marl.objectives.divergences import categorical_kl
from torchrl_marl.objectives.surrogates import kl_interval

OLD = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).double()  # eighths: eight rows are an exact expectation
COPIES = torch.tensor([4, 2, 1, 1])


def logged_kl(new):
    """What the losses log as the divergence, the mean of f over rows, on rows that the old policy makes exact."""
    game = Game(torch.zeros(1, 4), num_agents=1)
    rows = game.rows(OLD)[torch.arange(4).repeat_interleave(COPIES)]
    actor, critic = game.networks(new)
    return MAPPOLoss(actor, critic, **EXACT)(rows)["kl_approx"]


@pytest.mark.parametrize("seed", range(5))
def test_the_expectation_of_f_under_the_old_policy_is_the_divergence(seed):
    """Eqs. (10) and (11): E_old[r - 1 - ln r] = KL(old || new), for any new policy."""
    new = random_policies(Game(torch.zeros(1, 4), num_agents=1), seed, distance=2.0)
    assert_close(logged_kl(new), categorical_kl(OLD.log(), new.log()).squeeze(), rtol=1e-6, atol=1e-7)
    assert logged_kl(new) > 0


def test_f_is_never_negative_and_zero_only_at_one_unlike_the_logarithm():
    """Theorem 1 (1), of each sample: mixtures of samples cannot cancel, as those of -ln r can (section 4.2).

    A single action, seen alone, has f >= 0 on both sides of ratio 1, while -ln r takes both signs.
    """
    game = Game(torch.zeros(1, 2), num_agents=1)
    old = torch.tensor([[[0.5, 0.5]]]).double()
    for probability in (1e-6, 0.25, 0.4999, 0.5001, 0.75, 1 - 1e-6):
        actor, critic = game.networks(torch.tensor([[[probability, 1 - probability]]]).double())
        loss, rows = MAPPOLoss(actor, critic, **EXACT), game.rows(old)
        for row in rows.split(1):
            assert loss(row)["kl_approx"] > 0
    actor, critic = game.networks(old)
    assert_close(MAPPOLoss(actor, critic, **EXACT)(game.rows(old))["kl_approx"], torch.zeros(()).double())


@pytest.mark.parametrize("target", [1e-4, 0.01, 0.088, 0.5, 2.0])
def test_as_f_is_convex_the_ratios_it_allows_are_the_interval_between_its_roots(target):
    """Theorem 1 (2): {x: f(x) <= d} is exactly [low, high]; f is convex on a grid around it, and steeper below 1."""
    low, high = kl_interval(target)
    ratio = torch.linspace(low / 2, 2 * high, 4001, dtype=torch.float64)
    f = ratio - 1 - ratio.log()
    inside = (ratio >= low) & (ratio <= high)
    assert torch.equal(f <= target, inside)
    assert (f.diff().diff() > 0).all()
    assert high - 1 > 1 - low


def test_ratios_within_the_interval_keep_the_divergence_within_its_target_and_not_the_other_way_round():
    """What the interval guarantees: if no action leaves it, KL <= d. The converse fails: one rare action may leave it.

    A clip does not keep ratios inside (Wang et al., Truly PPO, 2020), so this is no guarantee for MARPO's update.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = kl_interval(0.05)
    found = 0
    for _ in range(200):
        new = (OLD.log() + 0.2 * torch.randn(4, generator=generator).double()).softmax(-1)
        within = bool(((new / OLD >= low) & (new / OLD <= high)).all())
        found += within
        assert not within or categorical_kl(OLD.log(), new.log()) <= 0.05
    assert found > 50
    rare = torch.tensor([0.98, 0.02]).double(), torch.tensor([0.95, 0.05]).double()
    assert rare[1][1] / rare[0][1] > high
    assert categorical_kl(rare[0].log(), rare[1].log()) < 0.05
