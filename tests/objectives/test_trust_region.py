"""Trust regions of the KL: divergences, products, solver, line search, against closed forms and explicit matrices."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal, OneHotCategorical
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close
from torchrl.modules import MaskedCategorical, TanhNormal

from torchrl_marl.objectives.divergences import categorical_kl, policy_kl
from torchrl_marl.objectives.trust_region import (
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    natural_step,
    trust_region_step,
)


@pytest.fixture(autouse=True)
def _double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- divergences


@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
def test_the_divergence_of_categoricals_is_weighted_by_the_old_policy(kind):
    old, new = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.5, 0.3, 0.2])
    by_hand = 0.1 * math.log(0.1 / 0.5) + 0.2 * math.log(0.2 / 0.3) + 0.7 * math.log(0.7 / 0.2)
    assert policy_kl(kind(old), kind(new)).item() == pytest.approx(by_hand, rel=1e-12)


def test_the_divergence_of_gaussians_is_the_closed_form_whether_squashed_or_not():
    loc, scale = torch.randn(2, 5, 3, 2), torch.rand(2, 5, 3, 2) + 0.5
    # KL(N(m, s) || N(n, t)) = ln(t / s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2, summed over the action's dimensions
    (m, n), (s, t) = loc, scale
    by_hand = ((t / s).log() + (s.square() + (m - n).square()) / (2 * t.square()) - 0.5).sum(-1)
    assert_close(policy_kl(*(Independent(Normal(*p), 1) for p in zip(loc, scale, strict=True))), by_hand)
    bounds = {"low": torch.tensor([-1.0, -2.0]), "high": torch.tensor([1.0, 3.0])}
    assert_close(policy_kl(*(TanhNormal(*p, **bounds) for p in zip(loc, scale, strict=True))), by_hand)


def test_illegal_actions_count_nothing_in_any_derivative():
    legal = torch.tensor([[True, False, True, True], [True, False, False, False], [False, False, False, False]])
    logits = torch.randn(3, 4, requires_grad=True)
    old = MaskedCategorical(logits=torch.randn(3, 4), mask=legal)
    kl = policy_kl(old, MaskedCategorical(logits=logits, mask=legal))
    dense = categorical_kl(old.logits[0, [0, 2, 3]], logits[0, [0, 2, 3]].log_softmax(-1))
    assert_close(kl, torch.stack([dense, torch.tensor(0.0), torch.tensor(0.0)]))  # one legal action, or none: no choice
    (gradient,) = torch.autograd.grad(kl.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient[0, 0], logits)
    for derivative in (gradient, second):
        assert derivative.isfinite().all()
        assert not derivative[~legal].any()
        assert derivative[0, legal[0]].all()


# --- products and solver


def test_the_product_is_that_with_the_expected_outer_product_of_scores():
    # F = E[grad log pi(a) grad log pi(a)^T] under pi itself, here summed over all actions: no second derivative in it
    network, observations = nn.Linear(3, 4), torch.randn(6, 3)
    parameters = list(network.parameters())
    fisher = torch.zeros(16, 16)
    for row in observations:
        log_probs = network(row).log_softmax(-1)
        for action in range(4):
            score = parameters_to_vector(torch.autograd.grad(log_probs[action], parameters, retain_graph=True))
            fisher += log_probs[action].exp().detach() * torch.outer(score, score) / len(observations)
    policy = Categorical(logits=network(observations))
    old = Categorical(logits=policy.logits.detach())
    product = fisher_vector_product(policy_kl(old, policy).mean(), parameters, damping=0.3)
    columns = [product(unit) for unit in torch.eye(16)]
    assert_close(torch.stack(columns), fisher + 0.3 * torch.eye(16))


def positive_matrix(size):
    square = torch.randn(size, size)
    return square @ square.T + 0.5 * torch.eye(size)


def test_conjugate_gradient_solves_in_as_many_steps_as_dimensions():
    matrix, target = positive_matrix(7), torch.randn(7)
    solution = conjugate_gradient(lambda v: matrix @ v, target, num_iterations=7)
    assert_close(solution, torch.linalg.solve(matrix, target), rtol=1e-6, atol=1e-8)


def test_conjugate_gradient_stands_still_once_it_is_there():
    matrix, target = positive_matrix(4), torch.randn(4)
    solutions = [conjugate_gradient(lambda v: matrix @ v, target, num_iterations=n, tolerance=1e-6) for n in (5, 50)]
    assert_close(*solutions, rtol=0, atol=0)
    assert not conjugate_gradient(lambda v: matrix @ v, torch.zeros(4)).any()


def test_the_natural_step_reaches_the_boundary_of_the_trust_region_to_second_order():
    matrix, gradient = positive_matrix(5), torch.randn(5)
    for num_iterations in (1, 2, 3, 10):  # long before the system is solved, too
        step = natural_step(lambda v: matrix @ v, gradient, max_kl=0.03, num_iterations=num_iterations)
        assert (step @ matrix @ step / 2).item() == pytest.approx(0.03)
    direction = torch.linalg.solve(matrix, gradient)
    assert_close(step / step.norm(), direction / direction.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [1e-12, 1e-8, 1e-5, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_natural_step_does_not_depend_on_the_gradients_scale(norm, dtype):
    matrix, gradient = positive_matrix(5).to(dtype), torch.randn(5, dtype=dtype)
    gradient = norm * gradient / gradient.norm()
    inverse = torch.linalg.solve(matrix.double(), gradient.double() / norm)
    expected = (2 * 0.03 / (inverse @ gradient.double() / norm)).sqrt() * inverse
    direction = conjugate_gradient(lambda v: matrix @ v, gradient)
    step = natural_step(lambda v: matrix @ v, gradient, max_kl=0.03)
    assert_close(direction.double() / norm, inverse, rtol=1e-3, atol=1e-4)
    assert_close(step.double(), expected, rtol=1e-3, atol=1e-4)


def test_no_gradient_gives_no_step():
    assert not natural_step(lambda v: v, torch.zeros(3), max_kl=0.1).any()


# --- line search


def search(outcomes, **options):
    """The line search on listed outcomes ``(improvement, KL)`` of fractions 1, 1/2, 1/4, ... of a step from 5 to 6."""
    tried = []

    def evaluate(x):
        tried.append(x.item())
        return tuple(map(torch.tensor, outcomes[len(tried) - 1]))

    found, info = backtracking_line_search(
        evaluate,
        torch.tensor([5.0]),
        torch.ones(1),
        expected=torch.tensor(8.0),
        max_kl=0.1,
        backtrack=0.5,
        num_backtracks=len(outcomes),
        **options,
    )
    assert tried == [5 + 0.5**k for k in range(len(tried))]
    return found.item(), len(tried), {key: value.item() for key, value in info.items()}


@pytest.mark.parametrize(
    ("first", "why"),
    [
        ((9.0, 0.1), "on the boundary"),
        ((9.0, 0.2), "beyond it"),
        ((4.0, 0.0), "half of what was expected, and no more"),
        ((-1.0, 0.0), "worse"),
        ((math.nan, 0.0), "no gain"),
        ((9.0, math.nan), "no divergence"),
    ],
    ids=str,
)
def test_a_fraction_is_refused_when_it_is(first, why):
    # the second fraction promises 4 and must give more than 2
    assert search([first, (2.1, 0.09)]) == (5.5, 2, {"step_fraction": 0.5, "improvement": 2.1, "kl": 0.09}), why


def test_the_first_good_fraction_is_taken():
    assert search([(4.1, 0.05), (9.0, 0.01)])[:2] == (6.0, 1)


def test_a_smaller_share_of_the_promise_can_do():
    assert search([(1.7, 0.0)], accept_ratio=0.2)[0] == 6.0


def test_a_slope_that_promises_nothing_still_needs_an_improvement():
    # expected can be negative for a solver that went astray; half of it must not pass for an improvement
    found, _ = backtracking_line_search(
        lambda x: (torch.tensor(-1.0), torch.tensor(0.0)),
        torch.zeros(1),
        torch.ones(1),
        expected=torch.tensor(-8.0),
        max_kl=0.1,
    )
    assert found.item() == 0


def test_nothing_good_leaves_the_start():
    nothing = {"step_fraction": 0, "improvement": 0, "kl": 0}
    assert search([(9.0, 0.2), (9.0, 0.2), (-1.0, 0.0)]) == (5.0, 3, nothing)


# --- the whole step


def a_policy_and_its_gain(scale=1.0):
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
    observations, actions, advantage = torch.randn(20, 3), torch.randint(4, (20,)), scale * torch.randn(20)
    old = Categorical(logits=network(observations).detach())

    def evaluate():
        new = Categorical(logits=network(observations))
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        return (ratio * advantage).mean(), policy_kl(old, new).mean()

    return network, evaluate


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 0.5])
def test_an_accepted_step_improves_within_the_bound_and_says_so(max_kl):
    network, evaluate = a_policy_and_its_gain()
    before, _ = evaluate()
    info = trust_region_step(list(network.parameters()), evaluate, max_kl=max_kl)
    after, kl = evaluate()
    assert 0 < info["step_fraction"] <= 1
    assert_close(info["kl"], kl)
    assert_close(info["improvement"], after - before)
    assert 0 < kl < max_kl
    assert after - before > 0.5 * info["step_fraction"] * info["expected_improvement"] > 0


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e3])
def test_a_small_or_a_large_gain_moves_parameters_as_far(scale):
    moved = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        network, evaluate = a_policy_and_its_gain(factor)
        start = parameters_to_vector(network.parameters()).detach()
        trust_region_step(list(network.parameters()), evaluate, max_kl=0.01)
        moved.append(parameters_to_vector(network.parameters()) - start)
    # residuals of 1e-4 of the gradient, which the damping of 0.1 makes steps of 1e-3 at most
    assert (moved[1] - moved[0]).norm() < 1e-3 * moved[0].norm()
    assert moved[0].norm() > 0.01


def test_parameters_move_in_place_and_only_those_given():
    network, evaluate = a_policy_and_its_gain()
    before = {name: p.clone() for name, p in network.named_parameters()}
    places = [p.data_ptr() for p in network.parameters()]
    trust_region_step(list(network[2].parameters()), evaluate, max_kl=0.01)
    assert [p.data_ptr() for p in network.parameters()] == places
    assert {n for n, p in network.named_parameters() if not torch.equal(p, before[n])} == {"2.weight", "2.bias"}
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("why", ["nothing to gain", "refused"])
def test_a_step_not_taken_leaves_every_bit(why):
    network, evaluate = a_policy_and_its_gain(scale=float(why == "refused"))
    before = [p.clone() for p in network.parameters()]
    options = {"accept_ratio": 1e9} if why == "refused" else {}
    info = trust_region_step(list(network.parameters()), evaluate, max_kl=0.01, **options)
    assert info["step_fraction"] == info["kl"] == info["improvement"] == 0
    assert all(torch.equal(p, q) for p, q in zip(before, network.parameters(), strict=True))
