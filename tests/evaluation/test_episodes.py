"""Evaluation episodes: one of each copy of an environment, its return and its length, counted by hand."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch.testing import assert_close
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, TransformedEnv

from torchrl_marl.evaluation import Episodes, evaluate
from torchrl_marl.evaluation.episodes import episode_info

GROUPS = {"hunters": 2, "prey": 1}


class ScriptedEnv(EnvBase):
    """Copies whose first episodes last as many steps as told, and all later ones two.

    At step t = 1, 2, ... of any episode the hunters are paid t and 2 t, and the prey 6 t.
    """

    def __init__(self, *lengths: int) -> None:
        copies = len(lengths)
        super().__init__(batch_size=torch.Size([copies]))
        self.lengths, self.time = torch.tensor(lengths), torch.zeros(copies, dtype=torch.long)
        self.group_map = {name: [f"{name}_{i}" for i in range(agents)] for name, agents in GROUPS.items()}
        shapes = {name: (copies, agents) for name, agents in GROUPS.items()}

        def each_group(key, spec):
            groups = {name: Composite({key: spec(shape)}, shape=shape) for name, shape in shapes.items()}
            return Composite(groups, shape=(copies,))

        self.observation_spec = each_group("observation", lambda shape: Unbounded((*shape, 1)))
        self.action_spec = each_group("action", lambda shape: Categorical(2, shape))
        self.reward_spec = each_group("reward", lambda shape: Unbounded((*shape, 1)))
        flag = Binary(1, (copies, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), shape=(copies,))

    def _reset(self, tensordict=None):
        if tensordict is not None and "_reset" in tensordict.keys():
            again = tensordict["_reset"].reshape(self.batch_size)
            self.time, self.lengths = torch.where(again, 0, self.time), torch.where(again, 2, self.lengths)
        return TensorDict(self._observation(), self.batch_size)

    def _step(self, tensordict):
        self.time = self.time + 1
        done = (self.time == self.lengths).unsqueeze(-1)
        groups = self._observation()
        for name, wages in (("hunters", (1.0, 2.0)), ("prey", (6.0,))):
            groups[name]["reward"] = (self.time[:, None] * torch.tensor(wages)).unsqueeze(-1)
        return TensorDict({**groups, "done": done, "terminated": done}, self.batch_size)

    def _observation(self):
        return {name: {"observation": torch.zeros(*self.batch_size, agents, 1)} for name, agents in GROUPS.items()}

    def _set_seed(self, seed):
        pass


class ReportingEnv(ScriptedEnv):
    """States of an episode at its step t whether it was won, which it is if t is above 2, and t as food; and a map."""

    def __init__(self, *lengths):
        super().__init__(*lengths)
        info = {"win_rate": Binary(1, (len(lengths), 1), dtype=torch.bool), "food": Unbounded((len(lengths),))}
        info |= {"map": Unbounded((len(lengths), 4))}
        self.observation_spec["info"] = Composite(info, shape=(len(lengths),))

    def _observation(self):
        time = self.time.unsqueeze(-1)
        info = {"win_rate": time > 2, "food": self.time.float(), "map": time.float().expand(-1, 4)}
        return {**super()._observation(), "info": TensorDict(info, self.batch_size)}


def play(*lengths, max_steps, env_class=ScriptedEnv):
    def act(*observations):
        return tuple(torch.zeros(observation.shape[:-1], dtype=torch.long) for observation in observations)

    keys = [[(name, key) for name in GROUPS] for key in ("observation", "action")]
    env = TransformedEnv(env_class(*lengths), RewardSum(reset_keys=["_reset"] * len(GROUPS)))
    return evaluate(env, TensorDictModule(act, *keys), seed=0, max_steps=max_steps)


def test_the_first_episode_of_every_copy_counts_with_its_return_and_length():
    episodes = play(1, 3, 7, 2, max_steps=7)
    assert episodes.lengths.tolist() == [1, 3, 7, 2]
    paid = torch.tensor([1.0, 6.0, 28.0, 3.0])  # 1 + 2 + ... + length
    assert_close(episodes.groups, {"hunters": 1.5 * paid, "prey": 6 * paid})
    assert_close(episodes.returns, 3 * paid)  # mean over agents: (1 + 2 + 6) / 3
    assert episodes.metrics() == {
        "return": [3.0, 18.0, 84.0, 9.0],
        "return_hunters": [1.5, 9.0, 42.0, 4.5],
        "return_prey": [6.0, 36.0, 168.0, 18.0],
        "episode_length": [1, 3, 7, 2],
    }


def test_nothing_is_played_after_the_last_episode(monkeypatch):
    steps, step = [], ScriptedEnv._step
    monkeypatch.setattr(ScriptedEnv, "_step", lambda env, tensordict: steps.append(1) or step(env, tensordict))
    assert play(1, 3, 2, max_steps=100).lengths.tolist() == [1, 3, 2]
    assert len(steps) == 3


def test_the_metric_of_won_episodes_is_the_win_rate():
    info = {"won": torch.tensor([[1.0], [0.0]]), "food": torch.zeros(2, 1)}
    data = TensorDict({"next": {"info": info}}, batch_size=2)
    assert set(episode_info(data)) == {"win_rate", "food"}
    assert episode_info(data)["win_rate"].tolist() == [1, 0]


def test_batches_of_episodes_are_joined_in_order():
    episodes = play(1, 3, 7, 2, max_steps=7, env_class=ReportingEnv)
    assert Episodes.joined(episodes.chunk(2)).metrics() == episodes.metrics()


def test_an_episode_that_does_not_end_is_refused():
    with pytest.raises(ValueError, match="1 of 3 episodes did not end within 6 steps"):
        play(1, 7, 2, max_steps=6)


def test_what_an_environment_states_at_the_last_step_of_an_episode_is_a_metric_of_it():
    episodes = play(1, 3, 7, 2, max_steps=7, env_class=ReportingEnv)
    assert episodes.metrics() == {
        "win_rate": [0.0, 1.0, 1.0, 0.0],
        "food": [1.0, 3.0, 7.0, 2.0],
        **play(1, 3, 7, 2, max_steps=7).metrics(),
    }
    halves = [half.info["food"].tolist() for half in episodes.chunk(2)]
    assert halves == [[1.0, 3.0], [7.0, 2.0]]
