"""Returns of random and of scripted agents in games and in VMAS's transport: `python benchmarks/games_baselines.py`.

What trained agents have to beat, over 320 episodes each, with the standard error of the mean. Scripted agents in
AeroCombat chase the nearest enemy that they know of, as the opponents do. Those in PaxMen eat, go to a dot that they
see, or else follow corridors without turning back, at random where these branch. Transport's script is VMAS's own.
"""

import argparse
from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from vmas.scenarios.transport import HeuristicPolicy

from torchrl_marl.envs import AeroCombatEnv, PaxMenEnv, make_env
from torchrl_marl.evaluation.episodes import episode_returns

_EAT = 4
_AHEAD = ((-1, 0), (1, 0), (0, -1), (0, 1))  # up, down, left, right
_BACK = (1, 0, 3, 2)  # the opposite of each


def explorer(env: PaxMenEnv) -> Callable[[TensorDictBase], TensorDictBase]:
    """Agents that follow corridors, ``("agents", "action")`` from what they see and where they faced."""
    radius = env.rules.view_radius
    side = 2 * radius + 1
    wall_weight, back_weight = -1e9, -1e3

    def act(data: TensorDictBase) -> TensorDictBase:
        walls, dots, _ = data["agents", "observation"].unflatten(-1, (3, side, side)).unbind(-3)
        value = torch.rand(*walls.shape[:-2], len(_AHEAD))
        for move, (down, right) in enumerate(_AHEAD):
            clear = torch.ones_like(walls[..., 0, 0], dtype=torch.bool)
            for distance in range(1, radius + 1):
                cell = ..., radius + distance * down, radius + distance * right
                clear = clear & (walls[cell] == 0)
                value[..., move] += 10.0 * (clear & (dots[cell] > 0))
            beside = ..., radius + down, radius + right
            value[..., move] += wall_weight * (walls[beside] > 0)
        facing = env.state["facing"]
        back = torch.tensor([*_BACK, 0])[facing]
        turned = torch.zeros_like(value).scatter(-1, back.unsqueeze(-1), back_weight)
        seen = value.amax(-1, keepdim=True) > 5
        value = torch.where(seen, value, value + turned)
        action = torch.where(dots[..., radius, radius] > 0, _EAT, value.argmax(-1))
        return data.set(("agents", "action"), action)

    return act


def pursuer(env: AeroCombatEnv) -> Callable[[TensorDictBase], TensorDictBase]:
    """Agents that fly as their opponents do."""

    def act(data: TensorDictBase) -> TensorDictBase:
        return data.set(("agents", "action"), env.rules.pursue(data["agents", "observation"]))

    return act


def carrier(env: EnvBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """VMAS's heuristic: every agent gets behind the package and pushes it to the goal."""
    script = HeuristicPolicy(continuous_action=True)

    def act(data: TensorDictBase) -> TensorDictBase:
        observation = data["agents", "observation"]
        action = script.compute_action(observation.flatten(0, 1), u_range=1.0)
        return data.set(("agents", "action"), action.unflatten(0, observation.shape[:2]))

    return act


def returns_of(env: EnvBase, policy: Callable[[TensorDictBase], TensorDictBase], max_steps: int) -> Tensor:
    """Return of the first episode of each copy, ``[num_envs]``."""
    data = env.rollout(max_steps, policy, break_when_any_done=False)
    first = data["next", "done"].squeeze(-1).int().argmax(-1, keepdim=True)
    return episode_returns(data).gather(-1, first).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=320)
    episodes = parser.parse_args().episodes
    torch.manual_seed(0)
    print("| task | random | scripted |\n|---|---|---|")
    for name, make, script, max_steps in (
        ("PaxMen-4", lambda: PaxMenEnv(4, num_envs=episodes, seed=0), explorer, 200),
        ("AeroCombat-2v2", lambda: AeroCombatEnv(2, num_envs=episodes, seed=0), pursuer, 240),
        ("transport", lambda: make_env("transport", num_envs=episodes, max_steps=300, seed=0), carrier, 300),
    ):
        scores = []
        for act in (lambda env: env.rand_action, script):
            env = make()
            returns = returns_of(env, act(env), max_steps)
            scores.append(f"{returns.mean():.2f} ± {returns.std() / len(returns) ** 0.5:.2f}")
        print(f"| {name} | {' | '.join(scores)} |")


if __name__ == "__main__":
    main()
