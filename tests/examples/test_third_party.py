import inspect

import pytest
import torch

from examples import third_party
from torchrl_marl.envs import make_custom

GAMES = [
    ("multiwalker", "Box2D", {}, {"agents": 3}),
    ("knights", "pygame", {"state": False}, {"agents": 4}),
    ("mujoco", "gymnasium_robotics", {"group_by": "padding"}, {"agents": 6}),
    ("battle", "magent2", {"group_by": "name", "state": False}, {"red": 6, "blue": 6}),
    ("pistonball", "pymunk", {"state": False}, {"agents": 4}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "package", "options", "groups"), GAMES)
def test_a_game_that_nobody_here_wrote_plays(name, package, options, groups, monkeypatch):
    for needed in ("pettingzoo", package):
        pytest.importorskip(needed)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    env = make_custom(f"examples.third_party:{name}", num_envs=2, max_steps=5, seed=0, **options)
    assert {group: len(agents) for group, agents in env.group_map.items()} == groups
    data = env.rollout(6, break_when_any_done=False)
    assert data["next", "done"][:, 4].all()
    for group in groups:
        assert torch.isfinite(data["next", group, "reward"]).all()


def test_each_takes_at_most_ten_lines():
    for name in third_party.__all__:
        assert len(inspect.getsource(getattr(third_party, name)).splitlines()) <= 10
