"""Small networks and batches for the tests of losses; no environment needed."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from torchrl_marl.modules import GroupSpec, make_actor, make_critic

AGENTS, OBSERVATION, ACTIONS, STATE = 3, 5, 4, 6
SPACES = ("categorical", "masked", "continuous")
PADDING = ("collector", "mask")  # where TorchRL says which rows are data


def group_shape(space, name="agents", agents=AGENTS):
    if space == "continuous":
        actions = {"action_low": (-1.0, -2.0), "action_high": (1.0, 3.0)}
    else:
        actions = {"num_actions": ACTIONS, "masked": space == "masked"}
    return GroupSpec(name, agents, OBSERVATION, state_size=STATE, **actions)


def make_networks(space, observes="joint_observation", *, name="agents", agents=AGENTS, value_norm=None, **options):
    """An actor whose distributions are far from uniform and a critic; the same ones for the same seed."""
    shape = group_shape(space, name, agents)
    generator = torch.Generator().manual_seed(7)
    actor = make_actor(shape, hidden_sizes=(8,), **options)
    critic = make_critic(shape, observes=observes, hidden_sizes=(8,), value_norm=value_norm, **options)
    with torch.no_grad():
        for parameter in [*actor.parameters(), *critic.parameters()]:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return actor, critic


def make_team_critic():
    """A hand-written critic that writes one value for the team at the root."""
    network = nn.Sequential(nn.Linear(STATE, 8), nn.Tanh(), nn.Linear(8, 1))
    return TensorDictModule(network, in_keys=["state"], out_keys=["state_value"])


def make_batch(actor, space, batch=(12,), *, name="agents", agents=AGENTS, live=None, padding=False, team=False):
    """A batch as a collector and a value estimator would leave it, drawn at random but the same in each call.

    Args:
        live: share of live agents; without it the batch has no mask.
        padding: the others' rows are no data at all, rather than those of dead agents.
        team: one advantage and value target for the team instead of one for each agent.
    """
    generator = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator)

    data = TensorDict({name: {"observation": normal(agents, OBSERVATION)}, "state": normal(STATE)}, batch_size=batch)
    if space == "masked":
        legal = torch.rand(*batch, agents, ACTIONS, generator=generator) < 0.6
        legal[..., 1] = True  # something is legal, and not always the first action
        data[name, "action_mask"] = legal
    with torch.no_grad():
        torch.manual_seed(13)
        data = actor(data).select((name, "observation"), "state", *actor[-1].in_keys, *_acted(name))
        data[name, "action_log_prob"] += 0.3 * normal(agents)  # ratios away from 1
    signal = (1,) if team else (agents, 1)
    data["advantage"] = 1 + 2 * normal(*signal)
    data["value_target"] = normal(*signal)
    if live is not None:
        data[PADDING if padding else (name, "mask")] = torch.rand(*batch, agents, generator=generator) < live
    return data


def add_transition(data, *, name="agents", team=False):
    """Rewards, dones and next observations ``[B, T]``, for a value estimator; the advantage is left to it."""
    generator = torch.Generator().manual_seed(17)
    data = data.exclude("advantage", "value_target")
    batch, agents = data.batch_size, data[name, "observation"].shape[-2]
    nxt = TensorDict(
        {
            name: {"observation": torch.randn(*batch, agents, OBSERVATION, generator=generator)},
            "state": torch.randn(*batch, STATE, generator=generator),
            "done": torch.rand(*batch, 1, generator=generator) < 0.3,
        },
        batch_size=batch,
    )
    nxt["terminated"] = nxt["done"] & (torch.rand(*batch, 1, generator=generator) < 0.5)
    reward = "reward" if team else (name, "reward")
    nxt[reward] = torch.randn(*batch, *((1,) if team else (agents, 1)), generator=generator)
    return data.set("next", nxt)


def total(losses):
    return sum(value.sum() for key, value in losses.items() if key.startswith("loss_"))


def gradients(losses, *networks):
    """Gradient of the summed losses with respect to each parameter of the networks; zeros where it does not reach."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    grads = torch.autograd.grad(total(losses), parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(parameters, grads, strict=True)]


def _acted(name):
    return [(name, "action"), (name, "action_log_prob")]
