"""Scenarios of VMAS whose steps no graph can stand in for."""

import torch
from vmas.scenarios.mpe.simple import Scenario as Simple


class Noisy(Simple):
    """A step of which no graph can be made."""

    def reward(self, agent):
        return super().reward(agent) + torch.rand(self.world.batch_dim)


class Deciding(Simple):
    """A step whose graph does not hold every fifth time."""

    def make_world(self, batch_dim, device, **options):
        self.time = torch.zeros(())
        return super().make_world(batch_dim, device, **options)

    def reward(self, agent):
        self.time = self.time + 1
        return super().reward(agent) * (10 if self.time % 5 == 0 else 1)
