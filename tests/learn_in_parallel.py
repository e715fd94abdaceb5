"""What test_distributed.py runs with torchrun: one gradient of a batch that the processes share."""

import sys

import torch
from tensordict import TensorDict
from torchrl.modules import RunningValueNorm
from torchrl.objectives import SoftUpdate

from torchrl_marl.collectors import ChunkReplayBuffer
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
from torchrl_marl.objectives import MARSLoss, QMIXLoss, standardize

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


def learn_values() -> dict[str, list[torch.Tensor]]:
    """Averaged gradients of QMIX, and what a buffer holds after two batches of this process's share of the steps."""
    loss = QMIXLoss(make_actor(SHAPE, hidden_sizes=[8]), SHAPE)
    SoftUpdate(loss, tau=0.5)
    broadcast_state(loss)
    rows = batch_of_all().exclude("advantage", "value_target")
    reward = torch.arange(ROWS * 3.0).reshape(ROWS, 3, 1)
    ends = torch.arange(ROWS).reshape(ROWS, 1) % 3 == 0
    following = {"agents": {**rows["agents"].roll(1, 0), "reward": reward}, "done": ends, "terminated": ends}
    rows["next"] = TensorDict(following, batch_size=ROWS)
    size = ROWS // world_size()
    own = rows[rank() * size : (rank() + 1) * size]
    loss(own)["loss_value"].backward()
    average_gradients(loss.parameters())
    buffer = ChunkReplayBuffer(loss.in_keys, capacity=20, batch_size=4)
    for _ in range(2):
        buffer.extend(own.unsqueeze(1))
    return {
        "value gradients": [parameter.grad for parameter in loss.parameters() if parameter.grad is not None],
        "buffer": list(buffer._buffer[:].flatten_keys("/").values()),
    }


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
        **learn_values(),
        "any": [any_process(rank() == world_size() - 1), any_process(False)],
    }
    torch.save(result, f"{path}{rank()}")


if __name__ == "__main__":
    main(sys.argv[1])
