"""Action values that can be set by hand, random networks and transitions for the tests of value-based losses."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import SoftUpdate

from torchrl_marl.modules import GroupSpec, make_actor, make_ldsa_actor, make_recurrent_actor
from torchrl_marl.objectives import LDSALoss, QMIXLoss, QPLEXLoss, VDNLoss

AGENTS, OBSERVATION, ACTIONS, SIZE = 3, 5, 4, 8
LOSSES = {"VDN": VDNLoss, "QMIX": QMIXLoss, "QPLEX": QPLEXLoss, "LDSA": LDSALoss}


class Table(nn.Module):
    """Action values of each agent in each of a few situations, which its observation names as a one-hot vector."""

    def __init__(self, agents, situations, actions):
        super().__init__()
        self.values = nn.Parameter(torch.randn(situations, agents, actions))

    def forward(self, observation):
        return torch.einsum("...ns,sna->...na", observation, self.values)


def make_table(agents=AGENTS, situations=OBSERVATION, actions=ACTIONS):
    """A network of TorchRL's kind, which is no policy."""
    table = Table(agents, situations, actions)
    return TensorDictModule(table, in_keys=[("agents", "observation")], out_keys=[("agents", "action_value")])


def with_targets(loss):
    """The loss, with an updater, without which TorchRL warns."""
    SoftUpdate(loss, tau=0.5)
    return loss


def make_spec(*, masked=False, state_size=None, agents=AGENTS, observation=OBSERVATION, actions=ACTIONS):
    return GroupSpec("agents", agents, observation, num_actions=actions, masked=masked, state_size=state_size)


def make_loss(name, *, masked=False, recurrent=False, **options):
    """A loss and its actor, both with random parameters and targets of their own."""
    spec = make_spec(masked=masked)
    if name == "LDSA":
        actor = make_ldsa_actor(spec, recurrent_size=SIZE, subtask_size=6)
    elif recurrent:
        actor = make_recurrent_actor(spec, hidden_sizes=(SIZE,), recurrent_size=SIZE, head_sizes=())
    else:
        actor = make_actor(spec, hidden_sizes=(SIZE,))
    loss = with_targets(LOSSES[name](actor, spec, **options))
    for tensors in (loss.parameters(), loss.target_local_value_network_params.values(True, True)):
        for tensor in tensors:
            tensor.data.normal_(std=0.5) if tensor.is_floating_point() else None
    return loss, actor


def make_transitions(loss, batch=(12,), *, masked=False, live=None):
    """Transitions, or sequences of them where the loss is recurrent, drawn at random but the same in each call."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator)

    def chance(share, *shape):
        return torch.rand(*batch, *shape, generator=generator) < share

    now = {"observation": normal(AGENTS, OBSERVATION)}
    following = {"observation": normal(AGENTS, OBSERVATION), "reward": normal(AGENTS, 1)}
    for agents in (now, following) if masked else ():
        agents["action_mask"] = chance(0.6, AGENTS, ACTIONS)
        agents["action_mask"][..., 1] = True
    for agents in (now, following) if live is not None else ():
        agents["mask"] = chance(live, AGENTS)
    legal = now.get("action_mask", torch.ones(*batch, AGENTS, ACTIONS, dtype=torch.bool))
    now["action"] = torch.where(legal, normal(AGENTS, ACTIONS), -torch.inf).argmax(-1)
    done = chance(0.3, 1)
    ends = {"done": done, "terminated": done & chance(0.5, 1)}
    data = TensorDict({"agents": now, "next": {"agents": following, **ends}}, batch_size=batch)
    for key in loss.recurrent_state_keys:
        size = 2 * SIZE if isinstance(loss, LDSALoss) else SIZE
        data["is_init"] = chance(0.3, 1)
        data[key] = torch.where(data["is_init"].unsqueeze(-1), 0.0, 0.5 * normal(AGENTS, size))
    return data
