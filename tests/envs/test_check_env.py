import logging
import re
import textwrap

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, MarlGroupMapType, StepCounter, TransformedEnv, VecNormV2, VmasEnv

from torchrl_marl.envs import RandomState, check_env, make_env
from torchrl_marl.envs.check import _episodes

NUM_ENVS, NUM_AGENTS, NUM_ACTIONS = 3, 2, 4


class Team(EnvBase):
    """Agents with legal actions, a state and a shared reward; every flaw that check_env looks for can be switched on.

    An episode ends after ``limit`` steps, and differently per environment without one.
    """

    def __init__(self, *, flaw=None, num_agents=NUM_AGENTS, limit=5):
        super().__init__(batch_size=[NUM_ENVS])
        self.flaw, self.limit = flaw, limit
        names = ("red_0", "red_1", "blue_0") if flaw == "two names" else [f"agent_{i}" for i in range(num_agents)]
        self.group_map = {"agents": list(names)}
        self.generator = torch.Generator().manual_seed(0)
        group, agents = (NUM_ENVS, num_agents), {"shape": (NUM_ENVS, num_agents)}
        self.mask_name = "legal" if flaw == "unread mask" else "action_mask"
        mask = Binary(shape=(*group, NUM_ACTIONS + (flaw == "mask of wrong size")), dtype=torch.bool)
        observation = {"observation": Unbounded((*group, 6)), self.mask_name: mask}
        self.observation_spec = Composite(
            agents=Composite(observation, **agents),
            state=Unbounded((NUM_ENVS, 20_000 if flaw == "large state" else 7)),
            shape=(NUM_ENVS,),
        )
        continuous = flaw == "mask of continuous actions"
        action = Bounded(-1, 1, (*group, 2)) if continuous else Categorical(NUM_ACTIONS, shape=group)
        self.action_spec = Composite(agents=Composite(action=action, **agents), shape=(NUM_ENVS,))
        self.reward_spec = Composite(agents=Composite(reward=Unbounded((*group, 1)), **agents), shape=(NUM_ENVS,))
        done = {name: Binary(shape=(NUM_ENVS, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        own_done = {name: Binary(shape=(*group, 1), dtype=torch.bool) for name in ("done", "terminated", "truncated")}
        if flaw == "no root done":
            done = {}
        if flaw in ("no root done", "agents drop out", "agents and episode end together"):
            done = {**done, "agents": Composite(own_done, **agents)}
        self.done_spec = Composite(done, shape=(NUM_ENVS,))

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _observe(self):
        data = self.observation_spec.zero()
        data["agents", "observation"] = torch.rand(data["agents", "observation"].shape, generator=self.generator)
        if self.flaw == "nan":
            data["agents", "observation"][0, 0, 0] = torch.nan
        mask = torch.rand(data["agents", self.mask_name].shape, generator=self.generator) < 0.5
        data["agents", self.mask_name] = mask | (self.flaw == "constant mask")
        return data

    def _reset(self, tensordict):
        count = torch.zeros(NUM_ENVS, 1, dtype=torch.long)
        if tensordict is not None and tensordict.get("_reset", None) is not None:
            count = torch.where(tensordict["_reset"], count, self.count)
        self.count = count
        return self._observe().update(self.full_done_spec.zero())

    def _step(self, tensordict):
        self.count = self.count + 1
        ended = self.count >= (self.limit or 10**9)
        if self.flaw == "uneven terminations":
            ended = self.count >= 2 + torch.arange(NUM_ENVS).unsqueeze(-1)
        terminated = ended & (self.flaw in ("time limit terminates", "uneven terminations"))
        flags = {"done": ended, "terminated": terminated, "truncated": ended & ~terminated}
        data = self._observe().update(self.full_done_spec.zero())
        reward = torch.rand(NUM_ENVS, 1, 1, generator=self.generator).expand(
            self.full_reward_spec["agents", "reward"].shape
        )
        own = torch.arange(float(reward.shape[1])).view(1, -1, 1) * (self.flaw == "own rewards")
        data["agents", "reward"] = (
            reward * torch.tensor([1.0, -1.0]).view(-1, 1) if self.flaw == "foes" else reward + own
        )
        for key in self.done_keys:
            name = key if isinstance(key, str) else key[-1]
            flag = flags[name] if isinstance(key, str) else flags[name].unsqueeze(1).expand(-1, NUM_AGENTS, -1).clone()
            if self.flaw == "agents drop out" and not isinstance(key, str) and name != "truncated":
                flag[:, 0] = True
            data[key] = flag
        return data

    def __repr__(self):
        return "Team()"


HEALTHY = [{}, {"flaw": "uneven terminations"}, {"flaw": "agents and episode end together"}]
FLAWS = [
    ({"num_agents": 1}, r"group 'agents' has a single agent \(agent_0\): .* group_map="),
    ({"flaw": "unread mask"}, r"\('agents', 'legal'\) looks like an action mask, .* \('agents', 'action_mask'\)"),
    ({"flaw": "constant mask"}, r"'action_mask'\) never changes in 48 steps \(all actions allowed\)"),
    ({"flaw": "mask of wrong size"}, r"'action_mask'\) is not read: it has 5 entries, .* have \{4\} choices"),
    ({"flaw": "mask of continuous actions"}, r"'action_mask'\) is not read: .* are not discrete"),
    ({"flaw": "time limit terminates"}, "all 9 episodes terminated after exactly 5 steps"),
    ({"limit": None}, r"no episode ended in 16 steps and no time limit is declared: .* StepCounter"),
    ({"flaw": "own rewards"}, r"\('agents', 'reward'\) differs between the agents in 48 of 48 steps"),
    (
        {"flaw": "two names", "num_agents": 3},
        r"'agents' holds agents of several names, red, blue\..*env\.group_by=name",
    ),
    ({"flaw": "large state"}, r"the state holds 20,000 numbers, .* all observations 12\. .*env\.state=false"),
    ({"flaw": "nan"}, r"\('agents', 'observation'\) holds non-finite values"),
    ({"flaw": "no root done"}, r"done flags exist only per group .*'agents', 'done'"),
    ({"flaw": "agents drop out"}, r"\('agents', 'done'\) is set before the episode is done in"),
]


@pytest.mark.parametrize("options", HEALTHY)
def test_a_healthy_environment_has_no_warnings(options, capsys):
    assert check_env(Team(**options), num_steps=16) == []
    assert capsys.readouterr().out.endswith("\nNo warnings.\n")


def test_agents_that_gain_what_others_lose_are_found():
    differs, foes = check_env(Team(flaw="foes"), num_steps=16)
    assert "differs between the agents in 48 of 48 steps" in differs
    assert foes.startswith(
        "agent_0 and agent_1 of group 'agents' gain what the other loses (correlation of rewards -1.00"
    )


@pytest.mark.filterwarnings("ignore:Support of VecNormV2 for containers")
def test_statistics_that_a_transform_keeps_to_itself_are_found():
    (warning,) = check_env(TransformedEnv(Team(), VecNormV2(in_keys=[("agents", "observation")])), num_steps=16)
    assert re.match(r"VecNormV2 keeps statistics of its own .* actor\.normalize_observations=true", warning)


@pytest.mark.parametrize("there", [1.0, 0.75])
def test_the_text_tells_how_many_steps_are_those_of_agents_that_have_left(there, capsys):
    class Mortal(Team):
        def __init__(self):
            super().__init__()
            self.observation_spec["agents", "mask"] = Binary(shape=(NUM_ENVS, NUM_AGENTS), dtype=torch.bool)

        def _observe(self):
            data = super()._observe()
            data["agents", "mask"] = (self.count.expand(-1, NUM_AGENTS) % 2 == 0) | torch.tensor([True, there == 1])
            return data

    assert check_env(Mortal(), num_steps=20) == []
    printed = capsys.readouterr().out
    assert ("Agents of 'agents' leave before the episode ends" in printed) == (there < 1)
    assert ("in 20.0% of its steps: policies skip these." in printed) == (there < 1)  # 2 of 5 steps, one of two agents


@pytest.mark.parametrize(("options", "message"), FLAWS, ids=str)
def test_each_flaw_gives_exactly_its_warning(options, message, capsys):
    warnings = check_env(Team(**options), num_steps=16)
    assert len(warnings) == 1
    assert re.search(message, warnings[0])
    assert "1 warning:" in capsys.readouterr().out


def test_the_text_names_everything_a_user_builds_networks_from(capsys):
    check_env(TransformedEnv(Team(limit=None), StepCounter(max_steps=9)), num_steps=20)
    expected = """
        Team, 3 environments in parallel, no device set
        time limit    9 steps, reported as truncated
        done flags    done, terminated, truncated
        at the root   state float32 [7], step_count int64 [1]
        state         yes

        group "agents", 2 agents: agent_0, agent_1
          action       int64 [2]           discrete, 4 actions
          observation  float32 [2, 6]
          action_mask  bool [2, 4]
          reward       float32 [2, 1]

        20 steps of random actions: 6 episodes ended, 0 by termination.

        No warnings.
        """
    assert capsys.readouterr().out == textwrap.dedent(expected).lstrip("\n")


def test_log_lines_of_torchrl_stay_out_of_the_text(monkeypatch):
    logger, records = logging.getLogger("torchrl"), []
    monkeypatch.setattr(logger, "handle", records.append)
    level = logger.level
    check_env(Team(), num_steps=4)
    assert records == []
    assert logger.level == level


def test_an_episode_without_flags_at_the_root_ends_when_all_agents_are_done():
    done = torch.zeros(NUM_ENVS, 6, NUM_AGENTS, 1, dtype=torch.bool)
    done[:, 2:, 0] = True
    done[:, 5] = True
    rollout = TensorDict({"next": {"agents": {"done": done, "terminated": done}}}, [NUM_ENVS, 6])
    lengths, terminated = _episodes(Team(flaw="no root done"), rollout)
    assert lengths.tolist() == [6] * NUM_ENVS
    assert terminated.all()


def test_random_states_stay_as_they_were():
    env = Team()
    env.generator.manual_seed(3)
    torch.rand(1)
    before = RandomState().state_dict(), env.generator.get_state()
    check_env(env, num_steps=4)
    after = RandomState().state_dict(), env.generator.get_state()
    assert after[0]["python"] == before[0]["python"]
    assert torch.equal(after[0]["numpy"][1], before[0]["numpy"][1])
    assert torch.equal(after[0]["torch_cpu"], before[0]["torch_cpu"])
    assert torch.equal(after[1], before[1])


def test_an_environment_without_groups_is_refused():
    env = Team()
    del env.group_map
    for wrapped in (env, TransformedEnv(env, StepCounter(max_steps=3))):
        with pytest.raises(ValueError, match=r"has no group_map\. Set self\.group_map = "):
            check_env(wrapped)


def test_data_that_break_the_specs_raise(monkeypatch):
    env = Team()
    step = env._step
    monkeypatch.setattr(env, "_step", lambda data: step(data).update({"surplus": torch.zeros(NUM_ENVS, 1)}))
    with pytest.raises(AssertionError, match="surplus"):
        check_env(env)


def test_a_task_of_make_env_has_no_warnings():
    pytest.importorskip("vmas")
    assert check_env(make_env("balance", num_envs=4, max_steps=40), num_steps=50) == []
    assert check_env(make_env("football", num_envs=2, continuous_actions=False), num_steps=4) == []


def test_vmas_time_limit_is_found_before_an_episode_ends(capsys):
    pytest.importorskip("vmas")
    (warning,) = check_env(make_env("wheel", num_envs=2, max_steps=90, time_limit="terminate"), num_steps=4)
    assert warning.startswith("the time limit of 90 steps is reported as `terminated`")
    out = capsys.readouterr().out
    assert "VmasEnv (wheel), 2 environments in parallel, cpu\ntime limit    90 steps, reported as terminated" in out
    assert "continuous in [-1, 1]" in out


def test_observations_of_different_sizes_in_one_group_are_found():
    pytest.importorskip("vmas")
    base = VmasEnv("simple_tag", num_envs=2, group_map=MarlGroupMapType.ALL_IN_ONE_GROUP)
    warnings = check_env(TransformedEnv(base, StepCounter(max_steps=3)), num_steps=4)
    assert [warning for warning in warnings if "differs in size" in warning] == [
        "('agents', 'observation') differs in size between the agents of the group, which one network cannot take. "
        "Group agents of the same type (group_map), or pad the entries to the same size."
    ]
