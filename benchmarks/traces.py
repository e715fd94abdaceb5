"""Loss traces of every recipe from a fixed seed, to compare two states of the code to the last bit.

    python benchmarks/traces.py before.json            # in one checkout
    python benchmarks/traces.py after.json --against before.json    # in the other; exits with 1 where a number differs

Ten iterations each, with small settings: a few minutes on one core.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from torchrl_marl.run.records import read_metrics

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = (
    "env.num_envs=8 env.max_steps=10 frames_per_batch=160 minibatch_size=80 epochs=2 total_frames=1600 "
    "evaluation.interval=800 evaluation.episodes=2 evaluation.video=false logger.wandb_project=null"
)
COMMANDS = {
    "mars": "mars_vmas.py",
    "ippo": "mars_vmas.py loss=ippo",
    "seac": "mars_vmas.py loss=seac actor.share_parameters=false critic.share_parameters=false "
    "critic.observes=observation",
    "gru": "mars_vmas.py env=coordsum loss=mappo actor=gru critic=gru chunk_length=5",
    "aerocombat": "mars_vmas.py env=aerocombat",
    "compiled": "mars_vmas.py compile=true",
    "compiled coordsum": "mars_vmas.py env=coordsum compile=true",
    "marpo": "marpo_vmas.py",
    "marpo rows": "marpo_vmas.py chunk_length=null loss.sequences=false",
    "happo": "oappo_vmas.py loss=happo",
    "oappo": "oappo_vmas.py",
    "oappo sampled": "oappo_vmas.py loss.reuse=sampled",
    "oatrpo": "oappo_vmas.py loss=oatrpo",
    "oappo gru": "oappo_vmas.py actor=gru chunk_length=5",
    "maze": "oappo_vmas.py env=maze",
    "mappo maze": "mars_vmas.py experiment=mappo_maze",
    "oappo maze": "oappo_vmas.py experiment=oappo_maze",
    "oatrpo maze": "oappo_vmas.py experiment=oappo_maze loss=oatrpo",
    "mat": "mars_vmas.py actor=mat",
    "sable": "mars_vmas.py actor=sable",
    "magpo": "magpo_vmas.py",
    "magpo mat": "magpo_vmas.py guider=mat",
    "ctds": "magpo_vmas.py loss=ctds",
    "magpo coordsum": "magpo_vmas.py experiment=magpo_coordsum",
    "groups": "groups_vmas.py",
}


def trace(command: str) -> dict[str, list[str]]:
    """Run a recipe; return every metric but times, as rows ``frames,value``."""
    recipe, *overrides = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, str(RECIPES / recipe), *overrides, *SMALL.split(), f"folder={folder}"]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            return {"error": [done.stderr.strip().splitlines()[-1]]}
        (config,) = Path(folder).rglob("config.yaml")
        return {
            name: [f"{frames:.0f},{value}" for frames, value in zip(*measured, strict=True)]
            for name, measured in read_metrics(config.parent).items()
            if not name.startswith("timers/")
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    traces = {name: trace(COMMANDS[name]) for name in arguments.only}
    arguments.output.write_text(json.dumps(traces))
    if arguments.against is not None:
        before = json.loads(arguments.against.read_text())
        differing = [name for name in traces if traces[name] != before.get(name)]
        print(f"{len(traces) - len(differing)} of {len(traces)} equal; different: {', '.join(differing) or 'none'}")
        sys.exit(bool(differing))
