import sys

import numpy as np
import pytest
import torch
from torchrl.envs import ExplorationType, exploration_type

from torchrl_marl.envs import RandomState, make_env, render_episode
from torchrl_marl.modules import make_recurrent_actor, with_recurrent_state

environment = pytest.importorskip("vmas.simulator.environment.environment")
Image = pytest.importorskip("PIL.Image")

BLUE = (55, 126, 184)  # of the first agent of "navigation"


@pytest.fixture
def no_opengl(monkeypatch):
    """What VMAS does on a machine without OpenGL, also to the random state: it has none of its clean-up."""

    def render(self, mode, env_index):
        torch.manual_seed(99)
        raise ImportError("Error occurred while running `from pyglet.gl import *`")

    monkeypatch.setattr(environment.Environment, "render", render)


def constant_policy(env, x, y):
    def policy(data):
        for key in env.action_keys:
            data[key] = torch.tensor([x, y]).expand(env.full_action_spec[key].shape)
        return data

    return policy


def frames_of(path):
    with Image.open(path) as gif:
        frames = []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB")).astype(int))
        return frames


def area(frame, color):
    return int((np.abs(frame - np.array(color)).max(-1) < 30).sum())


def test_film_has_a_frame_for_the_start_and_one_per_step(tmp_path):
    """With whatever renderer this machine has."""
    env = make_env("navigation", num_envs=2, max_steps=100, seed=0)
    path = render_episode(env, env.rand_action, str(tmp_path / "new" / "film.gif"), max_steps=5)
    assert path == tmp_path / "new" / "film.gif"
    frames = frames_of(path)
    assert len(frames) == 6
    assert max(frames[0].shape[:2]) <= 400


def test_an_mp4_has_a_frame_per_step_and_a_last_one_that_stays(tmp_path):
    count_frames = pytest.importorskip("imageio_ffmpeg").count_frames_and_secs
    env = make_env("navigation", num_envs=1, max_steps=100, seed=0)
    path = render_episode(env, env.rand_action, tmp_path / "film.MP4", max_steps=5, fps=10)
    assert count_frames(str(path))[0] == 6 + 15


def test_missing_ffmpeg_names_the_command_that_installs_it(tmp_path, monkeypatch):
    env = make_env("wheel", num_envs=1)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[video\]"'):
        render_episode(env, env.rand_action, tmp_path / "film.mp4", max_steps=5)


@pytest.mark.usefixtures("no_opengl")
def test_film_stops_at_the_end_of_the_episode(tmp_path):
    env = make_env("wheel", num_envs=2, max_steps=3, seed=0)
    assert len(frames_of(render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=50))) == 4


def test_frames_come_from_vmas_where_it_can_draw(tmp_path, monkeypatch):
    calls = []

    def render(self, mode, env_index):
        calls.append((mode, env_index))
        return np.full((700, 700, 3), (200, 30, 90), dtype=np.uint8)

    monkeypatch.setattr(environment.Environment, "render", render)
    env = make_env("wheel", num_envs=4, seed=0)
    frame = frames_of(render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=2, env_index=3))[-1]
    assert calls == [("rgb_array", 3)] * 3
    assert area(frame, (200, 30, 90)) >= 350 * 350


@pytest.mark.usefixtures("no_opengl")
def test_without_opengl_agents_and_goals_are_drawn_from_their_shapes(tmp_path):
    env = make_env("navigation", num_envs=2, seed=0)
    path = render_episode(env, constant_policy(env, 0.0, 0.0), tmp_path / "film.gif", max_steps=1)
    radius = 0.1  # of an agent of "navigation"; area of its disc in pixels by the width of the world in the picture
    agents = torch.stack([agent.state.pos[0] for agent in env.world.entities])
    extent = (agents.amax(0) - agents.amin(0)).max() + 2 * radius
    scale = 360 / (1.06 * extent.item())
    assert area(frames_of(path)[0], BLUE) == pytest.approx(np.pi * (scale * radius) ** 2, rel=0.3)


@pytest.mark.usefixtures("no_opengl")
def test_camera_keeps_agents_in_the_frame_while_they_leave(tmp_path):
    env = make_env("navigation", num_envs=2, seed=0)
    frames = frames_of(render_episode(env, constant_policy(env, 1.0, 0.3), tmp_path / "film.gif", max_steps=60))
    assert area(frames[0], BLUE) > 20
    assert area(frames[-1], BLUE) == pytest.approx(area(frames[0], BLUE), rel=0.25)


@pytest.mark.usefixtures("no_opengl")
@pytest.mark.parametrize(
    "scenario", ["balance", "football", "kinematic_bicycle", "multi_give_way", "simple_world_comm"]
)
def test_every_kind_of_shape_and_group_can_be_drawn(scenario, tmp_path):
    env = make_env(scenario, num_envs=2, seed=0)
    frames = frames_of(render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=3))
    assert len(frames) == 4
    assert all(len(np.unique(frame.reshape(-1, 3), axis=0)) > 5 for frame in frames)


@pytest.mark.usefixtures("no_opengl")
def test_a_film_of_100_steps_stays_below_a_megabyte(tmp_path):
    env = make_env("simple_tag", num_envs=2, seed=0)
    assert render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=100).stat().st_size < 500_000


@pytest.mark.usefixtures("no_opengl")
def test_policy_acts_deterministically_and_without_gradients(tmp_path):
    env = make_env("wheel", num_envs=2, seed=0)
    seen = []

    def policy(data):
        seen.append((exploration_type(), torch.is_grad_enabled()))
        return env.rand_action(data)

    render_episode(env, policy, tmp_path / "film.gif", max_steps=2)
    assert seen == [(ExplorationType.DETERMINISTIC, False)] * 2


@pytest.mark.usefixtures("no_opengl")
def test_random_state_stays_as_it_was(tmp_path):
    env = make_env("navigation", num_envs=2, seed=0)
    before = RandomState().state_dict()
    render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=2)
    after = RandomState().state_dict()
    assert torch.equal(after["torch_cpu"], before["torch_cpu"])
    assert torch.equal(after["vmas"]["torch_cpu"], before["vmas"]["torch_cpu"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "film.avi"}, "path must end in .gif or .mp4, got film.avi"),
        ({"env_index": 2}, r"env_index must be in 0\.\.1, got 2"),
        ({"max_steps": 0}, "max_steps and fps must be at least 1, got 0 and 20"),
        ({"fps": 0}, "max_steps and fps must be at least 1, got 5 and 0"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    env = make_env("wheel", num_envs=2)
    with pytest.raises(ValueError, match=message):
        render_episode(env, env.rand_action, **{"path": "film.gif", "max_steps": 5, **change})


def test_other_environments_are_refused(tmp_path):
    from torchrl.testing.mocking_classes import CountingEnv

    with pytest.raises(ValueError, match=r"with a method render\(env_index\) can be filmed, got CountingEnv"):
        render_episode(CountingEnv(), lambda data: data, tmp_path / "film.gif", max_steps=5)


def test_missing_pillow_names_the_command_that_installs_it(tmp_path, monkeypatch):
    env = make_env("wheel", num_envs=2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.delitem(sys.modules, "PIL.Image")
    with pytest.raises(ImportError, match=r'pip install "torchrl_marl\[vmas\]"'):
        render_episode(env, env.rand_action, tmp_path / "film.gif", max_steps=5)


@pytest.mark.usefixtures("no_opengl")
@pytest.mark.parametrize("prepared", [False, True])
def test_a_policy_keeps_its_memory_from_frame_to_frame(prepared, tmp_path):
    env = make_env("wheel", num_envs=2, seed=0)
    actor = make_recurrent_actor(env, recurrent_size=4)
    memories = []

    def remember(module, inputs, output):
        memories.append(bool(inputs[0]["agents", "recurrent_state"].any()))

    actor.register_forward_hook(remember)
    render_episode(with_recurrent_state(env, actor) if prepared else env, actor, tmp_path / "film.gif", max_steps=3)
    assert memories == [False, True, True]
