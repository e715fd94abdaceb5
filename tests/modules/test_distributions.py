"""Drawing by inversion: the right frequencies, nothing of probability 0, and Torch's distributions otherwise."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from torchrl.modules import MaskedCategorical

from torchrl_marl.modules.distributions import InversionCategorical, InversionMaskedCategorical, draw_by_inversion

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
