"""What test_distributed.py runs with torchrun: one gradient of a batch that the processes share."""

import sys

import torch
from tensordict import TensorDict
from torchrl.modules import RunningValueNorm

from torchrl_marl.distributed import (
    any_process,
    average_gradients,
    broadcast_from_main,
    broadcast_state,
    gather,
    init_distributed,
    rank,
    world_size,
)
from torchrl_marl.modules import GroupSpec, make_actor, make_critic
from torchrl_marl.objectives import MARSLoss, standardize

SHAPE = GroupSpec("agents", num_agents=3, observation_size=4, num_actions=5)
ROWS = 8


def batch_of_all() -> TensorDict:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(ROWS, 3, *shape, generator=generator)

    agents = {
        "observation": normal(4),
        "action": torch.randint(5, (ROWS, 3), generator=generator),
        "action_log_prob": normal() / 10 - 1.6,
        "mask": torch.arange(ROWS * 3).reshape(ROWS, 3) % 4 != 0,  # as many live agents in each half
    }
    return TensorDict(
        {"agents": agents, "advantage": 3 * normal(1), "value_target": 5 + 2 * normal(1)}, batch_size=ROWS
    )


def main(path: str) -> None:
    """Save the gradient, the advantages and the value statistics."""
    init_distributed()
    torch.manual_seed(rank())  # other weights in each process, until they learn together
    actor, critic = (
        make_actor(SHAPE, hidden_sizes=[8]),
        make_critic(SHAPE, hidden_sizes=[8], value_norm=RunningValueNorm(shape=1)),
    )
    loss = MARSLoss(actor, critic, functional=False, normalize_advantage=False)
    broadcast_state(loss)
    rows = ROWS // world_size()
    batch = batch_of_all()[rank() * rows : (rank() + 1) * rows]
    loss.update_value_norm(batch, gather=gather)
    batch["advantage"] = standardize(batch["advantage"], batch["agents", "mask"], gather=gather)
    losses = loss(batch)
    (losses["loss_objective"] + losses["loss_entropy"] + losses["loss_critic"]).backward()
    average_gradients(loss.parameters())
    result = {
        "gradients": [parameter.grad for parameter in loss.parameters()],
        "advantage": gather(batch["advantage"]),
        "value statistics": list(critic.buffers()),
        "first decides": broadcast_from_main(lambda: 10 + rank()),
        "any": [any_process(rank() == world_size() - 1), any_process(False)],
    }
    torch.save(result, f"{path}{rank()}")


if __name__ == "__main__":
    main(sys.argv[1])
