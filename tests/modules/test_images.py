import pytest
import torch
from tensordict import TensorDict

from tests.recipes.runs import run_folders, run_recipe
from torchrl_marl.envs import check_env, make_custom
from torchrl_marl.export import export_policy
from torchrl_marl.modules import GroupSpec, make_actor, make_cnn_actor, make_cnn_critic
from torchrl_marl.run.checkpoints import load_policy

SMALL = {"num_channels": (4, 4), "kernel_sizes": (3, 3), "strides": (2, 1), "features": 8, "hidden_sizes": (8,)}
SPEC = GroupSpec("agents", num_agents=2, observation_size=12 * 10 * 3, image=(12, 10, 3), num_actions=4)


class Lights:
    """Two agents see coloured pictures of 12 x 10 pixels (Gymnasium's Tuple style)."""

    def __init__(self):
        import numpy as np
        from gymnasium.spaces import Box, Discrete, Tuple

        self.observation_space = Tuple([Box(0, 255, (12, 10, 3), np.uint8)] * 2)
        self.action_space = Tuple([Discrete(4)] * 2)

    def reset(self, seed=None):
        import numpy as np

        self.random = np.random.default_rng(seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), float(sum(action)), False, False, {}

    def seen(self):
        return list(self.random.integers(0, 256, (2, 12, 10, 3), dtype="uint8"))


def images(spec=SPEC, batch=5):
    shape = (batch, spec.num_agents)
    pictures = torch.randint(256, (*shape, *spec.image), dtype=torch.uint8)
    beside = {"observation": torch.randn(*shape, spec.observation_size)} if spec.image_key == "image" else {}
    return TensorDict({"agents": TensorDict({**beside, spec.image_key: pictures}, shape)}, batch)


def test_both_layouts_and_scales_of_an_image_are_the_same_to_a_network():
    first = GroupSpec("agents", num_agents=2, observation_size=360, image=(3, 12, 10), num_actions=4)
    data = images()
    moved = data.clone().set(("agents", "observation"), data["agents", "observation"].movedim(-1, -3))
    scaled = data.clone().set(("agents", "observation"), data["agents", "observation"] / 255)
    for build, entry in ((make_cnn_actor, "logits"), (make_cnn_critic, "state_value")):
        results = []
        for spec, batch in ((SPEC, data), (first, moved), (SPEC, scaled)):
            torch.manual_seed(0)
            results.append(build(spec, **SMALL)(batch.clone())["agents", entry])
        assert results[0].std() > 0
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("observes", ["joint_observation", "observation"])
def test_a_critic_depends_on_the_images_that_it_observes(observes):
    torch.manual_seed(0)
    critic, data = make_cnn_critic(SPEC, observes=observes, **SMALL), images()
    other = data.clone()
    other["agents", "observation"][:, 1] = 0
    first, changed = (critic(batch)["agents", "state_value"][:, 0] for batch in (data, other))
    assert first.shape == (5, 1)
    assert torch.equal(first, changed) == (observes == "observation")


@pytest.mark.parametrize("space", [{"num_actions": 4}, {"action_low": (-1.0,), "action_high": (1.0,)}])
def test_an_image_and_a_vector_are_joined_agent_by_agent(space):
    spec = GroupSpec("agents", 2, observation_size=4, image=(12, 10, 3), image_key="image", **space)
    torch.manual_seed(0)
    critic = {"observes": "observation"}
    networks = [(make_cnn_actor(spec, **SMALL)[0], "logits" if spec.num_actions else "loc")]
    networks.append((make_cnn_critic(spec, **critic, **SMALL), "state_value"))
    data = images(spec)
    for network, entry in networks:
        before = network(data.clone())["agents", entry]
        for key in ("image", "observation"):
            other = data.clone()
            other["agents", key][:, 1] = 0
            after = network(other)["agents", entry]
            assert torch.equal(after[:, 0], before[:, 0])
            assert not (after[:, 1] == before[:, 1]).all(-1).any()
    joint = make_cnn_critic(spec, **SMALL)(data.clone())
    assert joint["agents", "state_value"].shape == (5, 2, 1)


def test_what_does_not_fit_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"images \[12, 10, 3\], .*360 numbers.* actor=cnn critic=cnn"):
        make_actor(SPEC)
    with pytest.raises(ValueError, match="too large for images of 12 x 10"):
        make_cnn_actor(SPEC)
    with pytest.raises(ValueError, match="need an entry for each layer"):
        make_cnn_actor(SPEC, num_channels=(4,))
    with pytest.raises(ValueError, match="A CNN needs images"):
        make_cnn_actor(GroupSpec("agents", 2, 8, num_actions=4))
    with pytest.raises(ValueError, match="observes must be joint_observation or observation; got 'state'"):
        make_cnn_critic(SPEC, observes="state")


def test_a_game_with_images_beside_vectors_is_trained_loaded_and_exported(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    train(monkeypatch, tmp_path, "tests.envs.wrappers.test_custom:Driving")
    (folder,) = run_folders(tmp_path)
    spec = GroupSpec("agents", 2, observation_size=4, image=(12, 10, 3), image_key="image", num_actions=4)
    assert load_policy(folder)(images(spec))["agents", "action"].shape == (5, 2)
    assert export_policy(folder, format="torch_export", agent=1).exists()


def train(monkeypatch, folder, factory):
    options = ["kernel_sizes=[3,3]", "strides=[2,1]", "num_channels=[4,4]", "features=8", "hidden_sizes=[8]"]
    networks = ["actor=cnn", "critic=cnn", *(f"{net}.{option}" for net in ("actor", "critic") for option in options)]
    game = ["env=custom", f"env.factory={factory}", "env.num_envs=4", "env.max_steps=5"]
    sizes = ["frames_per_batch=40", "total_frames=80", "evaluation.interval=40", "minibatch_size=20"]
    run_recipe(monkeypatch, folder, *game, *networks, *sizes)


def test_a_game_with_images_is_trained_loaded_and_exported(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    assert make_custom(Lights, num_envs=2, seed=0).reset()["agents", "observation"].dtype == torch.uint8
    check_env(make_custom(Lights, num_envs=2, seed=0), num_steps=4)
    train(monkeypatch, tmp_path, "tests.modules.test_images:Lights")
    (folder,) = run_folders(tmp_path)
    assert load_policy(folder)(images())["agents", "action"].shape == (5, 2)
    assert export_policy(folder, format="torch_export", agent=1).exists()
