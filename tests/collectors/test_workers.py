"""Several processes collect what one would, from their own parts of the environments."""

import importlib.util
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from torchrl_marl.collectors import multiprocess_collector, ray_collector
from torchrl_marl.envs import RandomState, make_env, make_maze, reseed
from torchrl_marl.modules import make_actor

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


@pytest.mark.parametrize("engine", ["multiprocess", pytest.param("ray", marks=[needs_ray, pytest.mark.slow])])
def test_workers_collect_what_one_process_would(engine: str, tmp_path: Path) -> None:
    """Bit for bit without noise, and with noise as far as each worker draws its own."""
    script = Path(__file__).with_name("collect.py")
    subprocess.run([sys.executable, str(script), engine, str(tmp_path / "batches")], check=True, timeout=280)
    results = torch.load(tmp_path / "batches", weights_only=False)
    for workers, by_hand in results.values():
        for ours, expected in zip(workers, by_hand, strict=True):
            assert ours.shape == (4, 6)
            assert ours.names == [None, "time"]
            assert set(ours.keys(True, True)) == set(expected.keys(True, True))
            assert all(torch.equal(ours[key], expected[key]) for key in expected.keys(True, True))
    first, second, third = (batch["agents", "action"] for batch in results["noisy"][0])
    assert not torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first[:2], first[2:])


@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("engine", [multiprocess_collector, ray_collector])
def test_copies_that_cannot_be_shared_evenly_are_refused(
    engine, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    env = make_maze("black_red", num_envs=4)
    with pytest.raises(ValueError, match=f"must divide the 4 environments.*got {num_workers}"):
        engine(env, make_actor(env), make_env=make_maze, num_workers=num_workers, frames_per_batch=8)


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    env = make_maze("black_red", num_envs=4)
    with pytest.raises(ImportError, match=r"torchrl_marl\[scale\]"):
        ray_collector(env, make_actor(env), make_env=make_maze, num_workers=2, frames_per_batch=8)


@pytest.mark.parametrize("build", [partial(make_maze, "black_red"), partial(make_env, "navigation")])
def test_a_seed_is_all_that_a_part_begins_with(build) -> None:
    """Two processes with different pasts go on alike, and two parts differ."""

    def go_on(rank: int, past: int) -> tuple:
        torch.manual_seed(past)
        env = build(num_envs=2, seed=past)
        env.reset()
        reseed(env, 5, rank=rank, world_size=2)
        observation = env.reset()["agents", "observation"]
        return observation, torch.rand(3), RandomState(env).state_dict()["numpy"][1]

    alike = zip(go_on(0, past=1), go_on(0, past=2), strict=True)
    assert all((torch.as_tensor(a) == torch.as_tensor(b)).all() for a, b in alike)
    assert not torch.equal(go_on(0, past=1)[1], go_on(1, past=1)[1])
