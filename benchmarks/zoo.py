"""Put the best policy of a finished run into the zoo: the actor alone, with what it scores in a thousand new episodes.

    python benchmarks/zoo.py runs/mars_vmas/navigation/mars/seed0-... navigation/mars

writes torchrl_marl/zoo/NAME.torchrl and docs/zoo/NAME.gif.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate

from torchrl_marl.envs import render_episode
from torchrl_marl.evaluation import evaluate, stratified_bootstrap_interval
from torchrl_marl.run.checkpoints import CheckpointFolder, best_checkpoint, load_policy, read_metadata

ROOT = Path(__file__).parents[1]


def put(run: Path, name: str, *, episodes: int = 1000) -> None:
    """Evaluate, film and store."""
    checkpoint = best_checkpoint(run)
    recorded = read_metadata(checkpoint)
    (session,) = json.loads((run / "summary.json").read_text())["sessions"]
    config, policy = recorded["config"], load_policy(checkpoint)
    make_env, max_steps = partial(instantiate, config["env"], device="cpu"), config["env"]["max_steps"]
    seed = 5_000_013 + config["seed"]  # starts that nothing before has used
    torch.manual_seed(seed)
    returns = evaluate(make_env(num_envs=episodes, seed=seed), policy, seed=seed, max_steps=max_steps).returns
    made = {**session, "episodes": episodes, "return": returns.mean().item()}
    made["interval"] = list(map(float, stratified_bootstrap_interval(returns, np.mean)))
    target = ROOT / f"torchrl_marl/zoo/{name}.torchrl"
    target.parent.mkdir(parents=True, exist_ok=True)
    metadata = {key: recorded[key] for key in ("actor", "frames")} | {"zoo": made}
    metadata["config"] = {**config, "folder": "runs"}  # not where the run lay on this machine
    with tempfile.TemporaryDirectory() as folder:
        saved = CheckpointFolder(Path(folder), actor=policy).save(
            frames=recorded["frames"], score=made["return"], metadata=metadata
        )
        target.write_bytes(saved.read_bytes())
    film = ROOT / f"docs/zoo/{name}.gif"
    film.parent.mkdir(parents=True, exist_ok=True)
    render_episode(make_env(num_envs=1, seed=seed), policy, film, max_steps=max_steps)
    print(f"{target}: {target.stat().st_size:,} bytes, return {made['return']:.3f} {made['interval']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", help="TASK/METHOD")
    arguments = parser.parse_args()
    put(arguments.run, arguments.name)
