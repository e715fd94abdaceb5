"""Processor time of one update (loss, backward, Adam) on the same rows, by method: a table of ratios to MAPPO.

An update of a sequential method is that of every agent and of the critic.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from tensordict import TensorDict
from torchrl.modules import PopArtValueNorm

from torchrl_marl.collectors import NextStepKeys
from torchrl_marl.modules import GroupSpec, make_actor, make_critic
from torchrl_marl.objectives import HAPPOLoss, MAPPOLoss, MARPOLoss, MARSLoss, OAPPOLoss, RatioLoss, SequentialLoss

SHAPE = GroupSpec("agents", num_agents=4, observation_size=18, action_low=(-1.0,) * 2, action_high=(1.0,) * 2)
METHODS = {
    "MAPPO": (MAPPOLoss, {}),
    "MARS": (MARSLoss, {}),
    "MARPO, without reflection": (MARPOLoss, {"reflection_coeff": 0.0}),
    "MARPO": (MARPOLoss, {}),
    "MARPO, on sequences": (MARPOLoss, {"sequences": True}),
    "HAPPO": (HAPPOLoss, {}),
    "OAPPO, 4 sources each": (OAPPOLoss, {"reuse_matrix": "AR"}),
    "OAPPO, a source drawn for each row": (OAPPOLoss, {"reuse_matrix": "AR", "reuse": "sampled"}),
}


def make_batch(rows: int) -> TensorDict:
    """Sequences of 10 steps: ``[rows / 10, 10]``."""
    batch = TensorDict({"agents": {"observation": torch.randn(rows // 10, 10, 4, 18)}}, (rows // 10, 10))
    with torch.no_grad():
        make_actor(SHAPE)(batch)
    batch["advantage"], batch["value_target"] = torch.randn(2, rows // 10, 10, 4, 1)
    batch["next", "agents"] = {"observation": batch["agents", "observation"].roll(-1, 1)}
    batch["next", "done"] = torch.zeros(rows // 10, 10, 1, dtype=torch.bool)
    return NextStepKeys(time_dim=1)(batch)


class Update:
    """One method with its own networks and optimiser."""

    def __init__(self, loss: type[RatioLoss], options: dict, compiled: bool) -> None:
        actor = make_actor(SHAPE, share_parameters=not issubclass(loss, SequentialLoss))
        critic = make_critic(SHAPE, value_norm=PopArtValueNorm(shape=1))
        self.loss = loss(actor, critic, functional=False, normalize_advantage=False, **options)
        self.compute = torch.compile(self.loss) if compiled else self.loss
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=1e-5)
        self.sequences = options.get("sequences", False)

    def __call__(self, batch: TensorDict) -> float:
        """Seconds of processor time."""
        data = (batch if self.sequences else batch.reshape(-1)).select(*self.loss.in_keys, strict=False)
        start = time.process_time()
        for _ in self.loss.turns(data) if isinstance(self.loss, SequentialLoss) else [None]:
            losses = self.compute(data)
            sum(losses[key] for key in losses.keys() if key.startswith("loss_")).backward()
            torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000, 4_000])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), compiled: {arguments.compiled}")
    print("| rows | method | ms | times MAPPO |\n|---|---|---|---|")
    for rows in arguments.rows:
        torch.manual_seed(0)
        batch = make_batch(rows)
        updates = {name: Update(*method, arguments.compiled) for name, method in METHODS.items()}
        seconds: dict[str, list[float]] = {name: [] for name in updates}
        for _ in range(arguments.rounds):  # in turns: what else the machine does hits all alike
            for name, update in updates.items():
                seconds[name].append(update(batch))
        medians = {name: statistics.median(values[5:]) for name, values in seconds.items()}
        for name, median in medians.items():
            print(f"| {rows} | {name} | {1e3 * median:.2f} | {median / medians['MAPPO']:.2f} |")


if __name__ == "__main__":
    main()
