import pytest
import torch

from torchrl_marl.envs.games.streams import draw_below, draw_uniform, random_streams

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def splitmix64(seed):
    """SplitMix64 with Python's unbounded integers."""
    word = 2**64 - 1
    state = seed & word
    while True:
        state = (state + 0x9E3779B97F4A7C15) & word
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        yield z ^ (z >> 31)


def unsigned(values):
    return [value % 2**64 for value in values.tolist()]


@pytest.mark.parametrize("device", DEVICES)
def test_streams_are_the_published_outputs_of_splitmix64(device):
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert unsigned(random_streams(1234567, 4, device=device)) == expected


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1, 10**30])
def test_any_integer_is_a_seed_modulo_the_word(seed):
    outputs = splitmix64(seed)
    assert unsigned(random_streams(seed, 5)) == [next(outputs) for _ in range(5)]


def test_the_first_streams_do_not_depend_on_their_number():
    assert torch.equal(random_streams(3, 7)[:4], random_streams(3, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", [1, 2, 10, 1000, 2**31 - 1])
def test_a_draw_scales_the_upper_half_of_the_next_output(bound, device):
    stream = random_streams(5, 3, device=device)
    outputs = [splitmix64(start) for start in unsigned(stream)]
    for _ in range(20):
        stream, drawn = draw_below(stream, bound)
        assert drawn.tolist() == [(next(output) >> 32) * bound >> 32 for output in outputs]


def test_draws_are_uniform_across_streams_and_along_a_stream():
    across = draw_below(random_streams(0, 60_000), 6)[1].bincount(minlength=6)
    stream, along = random_streams(1, 60), torch.zeros(6, dtype=torch.int64)
    for _ in range(1000):
        stream, drawn = draw_below(stream, 6)
        along += drawn.bincount(minlength=6)
    for counts in (across, along):
        chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
        assert chi_square < 20.5  # five degrees of freedom: one seed in a thousand is above


def test_drawing_leaves_the_given_stream_as_it_was():
    stream = random_streams(0, 3)
    before = stream.clone()
    draw_below(stream, 10)
    assert torch.equal(stream, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_uniform_draws_are_two_parts_of_each_output(count, device):
    stream = random_streams(5, 6, device=device).reshape(2, 3)
    outputs = [splitmix64(start) for start in unsigned(stream.flatten())]
    for _ in range(3):
        stream, drawn = draw_uniform(stream, count)
        assert drawn.shape == (2, 3, count)
        for output, numbers in zip(outputs, drawn.reshape(6, count).tolist(), strict=True):
            words = [next(output) for _ in range((count + 1) // 2)]
            parts = [part % 2**24 / 2**24 for word in words for part in (word >> 40, word >> 16)]
            assert numbers == parts[:count]


def test_uniform_draws_fill_the_unit_interval_evenly():
    _, drawn = draw_uniform(random_streams(0, 1000), 100)
    assert 0 <= drawn.min() < 1e-4
    assert 1 - 1e-4 < drawn.max() < 1
    counts = (drawn * 10).long().flatten().bincount(minlength=10)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 27.9  # nine degrees of freedom: one seed in a thousand is above
    neighbours = torch.stack([drawn[:, :-1].flatten(), drawn[:, 1:].flatten()])
    assert neighbours.corrcoef()[0, 1].abs() < 0.012  # four standard deviations
