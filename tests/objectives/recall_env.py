"""A task that needs a memory: what is shown at the first step of an episode has to be done at its last one."""

import torch
from tensordict import TensorDict
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase


class RecallEnv(EnvBase):
    """Each agent sees its own cue, -1 or 1, at the first step and zeros from then on.

    At the last step, which only the second entry of the observation announces, an agent is paid 1 for the action that
    its cue named. Without a memory nothing beats one half.
    """

    def __init__(self, num_envs, *, num_agents=2, num_steps=5):
        super().__init__(batch_size=torch.Size([num_envs]))
        self.num_steps = num_steps
        self.group_map = {"agents": [f"agent_{i}" for i in range(num_agents)]}
        shape = (num_envs, num_agents)

        def group(**specs):
            return Composite({"agents": Composite(specs, shape=shape)}, shape=shape[:1])

        self.observation_spec = group(observation=Unbounded((*shape, 2)))
        self.action_spec = group(action=Categorical(2, shape))
        self.reward_spec = group(reward=Unbounded((*shape, 1)))
        flag = Binary(1, (num_envs, 1), dtype=torch.bool)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), shape=shape[:1])
        self.cue, self.time = torch.zeros(shape, dtype=torch.int64), torch.zeros(num_envs, dtype=torch.int64)

    def _reset(self, tensordict=None):
        start = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict.keys():
            start = tensordict["_reset"].reshape(self.batch_size)
        self.time = torch.where(start, 0, self.time)
        self.cue = torch.where(start.unsqueeze(-1), torch.randint(2, self.cue.shape), self.cue)
        return TensorDict({"agents": self._group(observation=self._observation())}, self.batch_size)

    def _step(self, tensordict):
        last = (self.time == self.num_steps - 1).unsqueeze(-1)
        reward = last & (tensordict["agents", "action"] == self.cue)
        self.time = self.time + 1
        agents = self._group(observation=self._observation(), reward=reward.float().unsqueeze(-1))
        return TensorDict({"agents": agents, "done": last, "terminated": last}, self.batch_size)

    def _group(self, **entries):
        return TensorDict(entries, self.cue.shape)

    def _observation(self):
        time = self.time.unsqueeze(-1)
        cue = torch.where(time == 0, 2 * self.cue - 1, 0)
        announced = (time == self.num_steps - 1).expand_as(cue)
        return torch.stack([cue, announced], -1).float()

    def _set_seed(self, seed):
        torch.manual_seed(0 if seed is None else seed)
