"""Drawing by inversion: the right frequencies, nothing of probability 0, and Torch's distributions otherwise."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from torchrl.modules import MaskedCategorical, TanhNormal

from torchrl_marl.modules.distributions import (
    CensoredTanhNormal,
    InversionCategorical,
    InversionMaskedCategorical,
    draw_by_inversion,
)

LOGITS = torch.tensor([[0.3, -1.2, 2.0, 0.0], [1.0, 1.0, -3.0, 0.5]])
MASK = torch.tensor([[True, True, False, True], [False, True, True, False]])


def with_uniform(value: int, probs: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What is drawn when the uniform number is this one of ``0..2**31 - 1``."""
    monkeypatch.setattr(torch, "randint_like", lambda tensor, high: torch.full_like(tensor, value * high // 2**31))
    return draw_by_inversion(probs).tolist()


@pytest.mark.parametrize(("uniform", "expected"), [(0.2, 0), (0.24, 0), (0.26, 1), (0.74, 1), (0.76, 2), (0.9, 2)])
def test_a_uniform_number_draws_the_first_entry_at_which_the_distribution_function_exceeds_it(
    uniform, expected, monkeypatch
):
    assert with_uniform(int(uniform * 2**31), torch.tensor([0.25, 0.5, 0.25]), monkeypatch) == expected


@pytest.mark.parametrize(("uniform", "expected"), [(0, [1, 0, 2]), (2**31 - 1, [3, 0, 3])])
def test_the_ends_of_the_uniform_numbers_draw_nothing_of_probability_zero(uniform, expected, monkeypatch):
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1e-9, 1.0, 0.0]])
    assert with_uniform(uniform, probs, monkeypatch) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_frequencies_are_the_probabilities(dtype):
    torch.manual_seed(0)
    probs = LOGITS.softmax(-1)
    draws = draw_by_inversion(probs.to(dtype).expand(100_000, 2, 4))
    frequencies = torch.nn.functional.one_hot(draws, 4).float().mean(0)
    deviation = (probs * (1 - probs) / 100_000).sqrt()
    assert (frequencies - probs).abs().le(4 * deviation + (1e-3 if dtype == torch.float16 else 0)).all()


@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 3)])
def test_samples_have_the_shape_and_the_type_that_torch_gives_them(sample_shape):
    for own, other in ((InversionCategorical(logits=LOGITS), Categorical(logits=LOGITS)), masked_pair()):
        expected = other.sample(sample_shape)
        sample = own.sample(sample_shape)
        assert (sample.shape, sample.dtype) == (expected.shape, expected.dtype)
        assert not own.sample(sample_shape).requires_grad


def masked_pair() -> tuple[Categorical, Categorical]:
    return InversionMaskedCategorical(logits=LOGITS, mask=MASK), MaskedCategorical(logits=LOGITS, mask=MASK)


def test_illegal_actions_are_never_drawn_and_every_legal_one_is():
    torch.manual_seed(0)
    draws = masked_pair()[0].sample((20_000,))
    seen = torch.nn.functional.one_hot(draws, 4).any(0)
    assert torch.equal(seen, MASK)


def test_all_but_drawing_is_the_distribution_of_torch():
    own, other = masked_pair()
    actions = torch.tensor([1, 2])
    assert_close(own.log_prob(actions), other.log_prob(actions), rtol=0, atol=0)
    assert_close(own.entropy(), other.entropy(), rtol=0, atol=0)
    assert torch.equal(own.deterministic_sample, other.mode)
    own, other = InversionCategorical(logits=LOGITS), Categorical(logits=LOGITS.flip(0))
    assert torch.equal(own.deterministic_sample, own.mode)
    assert_close(kl_divergence(own, other), kl_divergence(Categorical(logits=LOGITS), other), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_what_is_drawn_where_nothing_is_legal_is_an_index(masked):
    nothing = torch.zeros(5, 4, dtype=torch.bool)
    policy = InversionMaskedCategorical(logits=torch.zeros(5, 4), mask=nothing)
    draws = policy.sample() if masked else draw_by_inversion(torch.full((5, 4), torch.nan))
    assert ((draws >= 0) & (draws < 4)).all()


# --- squashed Gaussians

LOW, HIGH = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.3])


def squashed(loc, scale, cls=CensoredTanhNormal, **options):
    return cls(torch.full((2,), loc, **options), torch.full((2,), scale, **options), low=LOW, high=HIGH)


@pytest.mark.parametrize("loc", [0.0, 3.0, -5.0, 6.0, 8.0])
@pytest.mark.parametrize("draw", ["rsample_and_log_prob", "sample_and_log_prob"])
def test_a_sample_is_torchrls_and_is_scored_as_the_action_that_it_is(loc, draw):
    policy, torchrls = squashed(loc, 1.0), squashed(loc, 1.0, TanhNormal)
    torch.manual_seed(0)
    action, log_prob = getattr(policy, draw)((1000,))
    torch.manual_seed(0)
    assert torch.equal(action, getattr(torchrls, draw)((1000,))[0])
    assert torch.equal(policy.log_prob(action), log_prob)


def test_an_action_inside_has_torchrls_density_and_one_at_a_bound_the_probability_of_being_there():
    policy, torchrls = squashed(2.0, 1.5), squashed(2.0, 1.5, TanhNormal)
    inside = LOW + (HIGH - LOW) * torch.tensor([[0.5, 0.9], [1e-5, 0.3], [1 - 1e-5, 1e-4]])
    assert_close(policy.log_prob(inside), torchrls.log_prob(inside), rtol=1e-6, atol=0)
    # tanh(x) = 1 - 1e-5 at x = 6.10303, so that Phi((2 - x) / 1.5) is the probability to be at the upper bound
    beyond, below = (math.log(math.erfc((6.10303 - sign * 2) / 1.5 / math.sqrt(2)) / 2) for sign in (1, -1))
    for high, low in ((HIGH, LOW), (HIGH - 1e-6 * (HIGH - LOW), LOW + 1e-6 * (HIGH - LOW))):
        assert policy.log_prob(high).item() == pytest.approx(2 * beyond, rel=1e-5)
        assert policy.log_prob(low).item() == pytest.approx(2 * below, rel=1e-5)


def test_where_torch_compiles_entries_are_scored_one_by_one_to_the_same_scores_entropies_and_gradients(monkeypatch):
    torch.manual_seed(0)
    loc, scale = (3 * torch.randn(50, 4, 2)).requires_grad_(), torch.rand(50, 4, 2).add(0.1).requires_grad_()
    action = CensoredTanhNormal(loc, scale, low=LOW, high=HIGH).sample()
    action[:10] = HIGH
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        policy = CensoredTanhNormal(loc, scale, low=LOW, high=HIGH)
        assert (policy._entries() is not None) is compiling
        torch.manual_seed(1)  # the entropy is that of a sample
        values = policy.log_prob(action), policy.entropy()
        found.append([*values, *(torch.autograd.grad(value.sum(), (loc, scale)) for value in values)])
    assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loc", [3.0, 5.0, 6.0, 8.0])
def test_ratios_have_a_mean_of_one_and_scores_of_zero_however_far_a_policy_saturates(loc):
    torch.manual_seed(0)
    num_samples = 200_000
    old, loc = squashed(loc, 1.0), torch.full((2,), loc + 0.2, requires_grad=True)
    action, log_prob = old.rsample_and_log_prob((num_samples,))
    ratio = (CensoredTanhNormal(loc, torch.full((2,), 0.9), low=LOW, high=HIGH).log_prob(action) - log_prob).exp()
    assert_close(ratio.mean().item(), 1.0, rtol=0, atol=4 * ratio.std().item() / num_samples**0.5)
    (score,) = torch.autograd.grad(ratio.mean(), loc)  # 0 for importance weights: the sum of probabilities is 1
    assert score.abs().max() < 4 * ratio.std().item() / 0.9 / num_samples**0.5 * 1.5


def test_the_probability_of_a_bound_and_its_gradient_keep_their_digits():
    distance = torch.tensor([-300.0, -20.0, -3.0, -0.5, 0.0, 0.5, 4.0, 12.0])
    expected_at = distance.double().requires_grad_()
    expected = torch.special.log_ndtr(expected_at)
    edge = torch.tensor(1 - 1e-5, dtype=torch.float64).atanh()
    loc = (distance + edge).float().unsqueeze(-1).requires_grad_()
    log_prob = CensoredTanhNormal(loc, torch.ones_like(loc)).log_prob(torch.ones_like(loc))
    gradients = (torch.autograd.grad(x.sum(), at)[0].flatten() for x, at in ((log_prob, loc), (expected, expected_at)))
    assert_close(log_prob.double(), expected, rtol=1e-4, atol=1e-6)
    assert_close(*(x.double() for x in gradients), rtol=1e-4, atol=1e-6)


def test_actions_from_elsewhere_have_finite_scores_and_gradients():
    loc = torch.tensor([[0.0], [8.0], [-300.0]], requires_grad=True)
    scale = torch.tensor([[1.0], [1e-4], [10.0]], requires_grad=True)
    for value in (-1.0, 1.0, 1.2, 1 - 2e-6, 0.0):  # on and over the bounds, too
        log_prob = CensoredTanhNormal(loc, scale).log_prob(torch.full((3, 1), value))
        derivatives = torch.autograd.grad(log_prob.sum(), (loc, scale))
        assert all(x.isfinite().all() for x in (log_prob, *derivatives)), value


def test_the_entropy_is_torchrls_estimate():
    policy, torchrls = squashed(8.0, 1.0), squashed(8.0, 1.0, TanhNormal)
    torch.manual_seed(0)
    entropy = policy.entropy()
    torch.manual_seed(0)
    assert torch.equal(entropy, -torchrls.rsample_and_log_prob()[1])
