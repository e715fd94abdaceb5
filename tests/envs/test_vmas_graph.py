"""The compiled VMAS environment is VMAS, and says so where it is not."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import VmasEnv

from torchrl_marl.envs import RandomState, make_env
from torchrl_marl.envs.vmas_graph import VmasGraphs

pytest.importorskip("vmas")
from vmas.scenarios.mpe.simple import Scenario as Simple

from tests.envs.vmas_scenarios import Deciding, Noisy


class CompiledVmasEnv(VmasEnv):
    """VMAS stepped and reset by its graphs, without a policy."""

    _graphs = None

    @staticmethod
    def compiler(module):
        return torch.compile(module, dynamic=False, options={"cpp_wrapper": not torch.cuda.is_available()})

    def _step(self, tensordict):
        outputs = self._own_graphs().try_step(
            [tensordict.get(key) for key in self.action_keys], lambda: VmasEnv._step(self, tensordict)
        )
        return super()._step(tensordict) if outputs is None else self._data(self._graphs._step_graph, outputs)

    def _reset(self, tensordict=None, **options):
        graphs, mask = self._own_graphs(), None if tensordict is None else tensordict.get("_reset", None)
        outputs = None if mask is None else graphs.try_reset(mask)
        if outputs is not None:
            return self._data(graphs._reset_graph, outputs)
        data = super()._reset(tensordict, **options)
        graphs.find_state()
        return data

    def _own_graphs(self):
        self._graphs = self._graphs or VmasGraphs(self, compile_step=self.compiler, compile_reset=self.compiler)
        return self._graphs

    def _data(self, graph, outputs):
        empty = self.fake_tensordict().exclude("next").empty(recurse=True)
        return empty.update(dict(zip(graph._keys, outputs, strict=True)))


class Traced(CompiledVmasEnv):
    """The graphs as they were traced: VMAS's own operations in its own order."""

    compiler = staticmethod(lambda module: module)


def played(env, num_steps, *, resets=(), random_state=None):
    """What follows if every agent keeps one random action; after the steps ``resets``, every third game begins anew."""
    torch.manual_seed(0)
    env.set_seed(0)
    if random_state is not None:
        RandomState(env).load_state_dict(random_state)
    action, data, steps = env.rand_action(), env.reset(), []
    for time in range(num_steps):
        step, data = env.step_and_maybe_reset(data.update(action))
        steps.append(step["next"])
        if time in resets:
            mask = torch.arange(env.batch_size[0]).unsqueeze(-1) % 3 == time % 3
            data = env.reset(TensorDict({"_reset": mask}, env.batch_size))
            steps.append(data.clone())
    return steps


def assert_close(steps, expected, *, rtol=0.0, atol=0.0):
    for step, true in zip(steps, expected, strict=True):
        torch.testing.assert_close(step.to_dict(), true.to_dict(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("scenario", "num_envs", "event"),
    [
        ("navigation", 24, ("agents", "info", "agent_collisions")),  # rows of a mask change; places are tried in resets
        ("balance", 16, "terminated"),
        ("transport", 4, ("agents", "observation")),
    ],
)
def test_traced_rollouts_with_resets_are_vmas_up_to_the_last_bit(scenario, num_envs, event):
    env = Traced(scenario, num_envs=num_envs, clamp_actions=True)
    expected = played(VmasEnv(scenario, num_envs=num_envs, clamp_actions=True), 40, resets=(1, 2, 4))
    assert_close(played(env, 40, resets=(1, 2, 4)), expected, rtol=1e-6, atol=1e-6)
    assert any(step[event].any() for step in expected if event in step.keys(True))
    assert not env._graphs.refused
    assert env._graphs._step_graph._misses == 0
    assert (env._graphs._reset_graph._misses == 0) == (scenario == "balance")  # the others try places until one is free


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_compiled_environment_is_vmas_up_to_rounding(device, monkeypatch):
    """Also where episodes end one by one, and after the checks have become rare."""
    options = {"num_envs": 4, "max_steps": 30, "device": device}
    expected = played(make_env("simple", **options), 80, resets=range(0, 80, 7))
    monkeypatch.setattr("torchrl_marl.envs.vmas.VmasEnv", CompiledVmasEnv)
    steps = played(make_env("simple", **options), 80, resets=range(0, 80, 7))
    assert_close(steps, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["navigation", "balance", "transport"])
def test_compiled_targets_are_vmas_up_to_rounding(scenario, monkeypatch):
    expected = played(make_env(scenario, num_envs=60, max_steps=50), 60)
    monkeypatch.setattr("torchrl_marl.envs.vmas.VmasEnv", CompiledVmasEnv)
    env = make_env(scenario, num_envs=60, max_steps=50)
    steps = played(env, 60)
    assert_close(steps, expected, rtol=1e-3, atol=1e-3)
    assert not env.base_env._graphs.refused


@pytest.mark.parametrize("frozen", [False, True])
def test_a_wrong_graph_is_found_and_vmas_goes_on(frozen):
    """Rewards that are 1e-2 too high, and, as Dynamo makes them of balance, those of the first step for ever."""
    rewards = []

    def miscompiled(module):
        def run(*inputs):
            valid, *outputs = module(*inputs)
            index = next(i for i, value in enumerate(outputs) if value.shape == (6, 1, 1))
            rewards.append(outputs[index] if frozen else outputs[index] + 1e-2)
            outputs[index] = rewards[0]
            return [valid, *outputs]

        return run

    class Wrong(CompiledVmasEnv):
        compiler = staticmethod(miscompiled)

    env, expected = Wrong("simple", num_envs=6), played(VmasEnv("simple", num_envs=6), 5)
    with pytest.warns(UserWarning, match=r"step of 'simple' falls back to VMAS: .*\('agents', 'reward'\)"):
        steps = played(env, 5)
    assert len(rewards) == 1 + frozen
    assert_close(steps, expected)


class Counting(Simple):
    def make_world(self, *args, **options):
        self.count = 0
        return super().make_world(*args, **options)

    def reward(self, agent):
        self.count += 1
        return super().reward(agent) * self.count


class Gathering(Simple):
    def reward(self, agent):
        reward = super().reward(agent)
        return reward - reward[reward < -0.5].sum()


class Asking(Simple):
    def make_world(self, batch_dim, device, **options):
        world = super().make_world(batch_dim, device, **options)
        world.agents[0]._collide = world.landmarks[0]._collide = True
        return world

    def reward(self, agent):
        return super().reward(agent) - float(self.world.collides(agent, self.world.landmarks[0]))


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        (Noisy, "draws random numbers"),
        (Counting, r"it changes scenario\.count"),
        (Gathering, "with the rows of a mask"),
        (Asking, "collide, not how far they are"),
    ],
)
def test_a_step_that_no_graph_repeats_is_left_to_vmas(scenario, reason):
    expected = played(VmasEnv(scenario(), num_envs=6), 5)
    with pytest.warns(UserWarning, match=reason):
        steps = played(Traced(scenario(), num_envs=6), 5)
    assert_close(steps, expected)


def test_a_step_in_which_python_decides_otherwise_is_done_by_vmas():
    env, expected = Traced(Deciding(), num_envs=6), played(VmasEnv(Deciding(), num_envs=6), 60)
    steps = played(env, 60)
    assert_close(steps, expected)
    assert not env._graphs.refused
    assert env._graphs._step_graph._misses == 60 // 5


def test_a_course_goes_on_from_a_saved_random_state():
    first, other = (Traced("balance", num_envs=6) for _ in range(2))
    played(first, 25)
    state = RandomState(first).state_dict()
    expected = played(first, 25, random_state=state)
    assert any(step["terminated"].any() for step in expected)
    assert_close(played(other, 25, random_state=state), expected)
