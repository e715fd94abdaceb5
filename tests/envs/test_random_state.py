import contextlib
import random
import sys

import numpy as np
import pytest
import torch
from torchrl.envs import InitTracker, StepCounter, TransformedEnv

from torchrl_marl.envs import CoordSumEnv, RandomState, make_env, preserve_random_state

pytest.importorskip("vmas")
ENVIRONMENT = "vmas.simulator.environment.environment"


def draw_from_all():
    """One draw from every generator; VMAS's shows in the start positions of an environment."""
    starts = make_env("navigation", num_envs=2).reset()["agents", "observation"]
    return random.random(), np.random.rand(), torch.rand(1).item(), starts.flatten().tolist()


def test_loading_repeats_every_draw_after_a_trip_through_a_file(tmp_path):
    draw_from_all()  # loads VMAS
    torch.save(RandomState().state_dict(), tmp_path / "state.pt")
    first = draw_from_all()
    second = draw_from_all()
    assert all(a != b for a, b in zip(first, second, strict=True))
    RandomState().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw_from_all() == first
    assert draw_from_all() == second


def everything():
    """All generators, read without RandomState, in a form that can be compared."""
    vmas = sys.modules[ENVIRONMENT].Environment.vmas_random_state
    states = [torch.get_rng_state(), np.random.get_state(), random.getstate(), *vmas]
    return [
        [part.tolist() if isinstance(part, np.ndarray) else part for part in state]
        if isinstance(state, tuple)
        else state.tolist()
        for state in states
    ]


def test_loading_restores_every_part_of_every_generator():
    draw_from_all()
    vmas = sys.modules[ENVIRONMENT].Environment.vmas_random_state
    vmas[1:] = [np.random.RandomState(5).get_state(), random.Random(5).getstate()]
    np.random.standard_normal(3)  # an odd number of normals leaves one in the state, also in Python's
    random.gauss(0, 1)
    vmas[1] = (*np.random.get_state()[:3], 1, 0.25)
    before, state = everything(), RandomState().state_dict()
    draw_from_all()
    np.random.rand(700)
    vmas[1:] = [np.random.RandomState(6).get_state(), random.Random(6).getstate()]
    RandomState().load_state_dict(state)
    assert everything() == before


@pytest.mark.parametrize("error", [None, KeyError])
def test_preserving_restores_every_generator_also_after_an_exception(error):
    draw_from_all()
    before = everything()
    with contextlib.suppress(KeyError), preserve_random_state():
        draw_from_all()
        assert everything() != before
        if error:
            raise error
    assert everything() == before


def test_vmas_imported_inside_is_left_as_its_import_outside_would_have_left_it(monkeypatch):
    draw_from_all()
    environment = sys.modules[ENVIRONMENT]
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, ENVIRONMENT)
        state = RandomState().state_dict()
    assert "vmas" not in state
    draw_from_all()
    RandomState().load_state_dict(state)
    torch_state, _, python_state = environment.Environment.vmas_random_state
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()


@pytest.mark.parametrize("preserve", [True, False])
def test_evaluation_changes_training_only_where_the_random_state_is_not_preserved(preserve):
    """False is the negative control: VMAS's environments share one stream, so an evaluation shifts the training."""

    def train(evaluate):
        torch.manual_seed(0)
        env = make_env("navigation", num_envs=3, max_steps=4, seed=0)
        before = env.rollout(4, break_when_any_done=False)
        if evaluate:
            with preserve_random_state() if preserve else contextlib.nullcontext():
                make_env("navigation", num_envs=2, max_steps=4, seed=1).rollout(4)
        after = env.rollout(6, break_when_any_done=False)  # starts with a reset, and has one at the time limit
        return torch.cat([before, after], -1)

    same = (train(evaluate=True) == train(evaluate=False)).all()
    assert same == preserve


def test_loading_brings_back_the_streams_of_an_environment_under_transforms(tmp_path):
    env = TransformedEnv(CoordSumEnv(num_envs=3, seed=0), InitTracker())
    env.rollout(3)
    torch.save(RandomState(env).state_dict(), tmp_path / "state.pt")
    starts = env.reset()["state"]
    inner = TransformedEnv(CoordSumEnv(num_envs=3, seed=7), StepCounter())
    other = TransformedEnv(inner, InitTracker(), auto_unwrap=False)
    RandomState(other).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other.reset()["state"], starts)


def test_a_state_of_another_environment_is_refused():
    state = RandomState(CoordSumEnv(num_envs=3)).state_dict()
    with pytest.raises(ValueError, match="the state holds streams of 1 environments, expected 0"):
        RandomState().load_state_dict(state)
    with pytest.raises(ValueError, match=r"streams must be of shape \[2\], got \[3\]"):
        RandomState(CoordSumEnv(num_envs=2)).load_state_dict(state)
