"""Small runs of a recipe, within this process or as a process of their own."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from torchrl_marl.run.records import read_metrics

RECIPES = Path(__file__).parents[2] / "recipes"
VALUE_BASED = {"ldsa", "qmix", "qplex", "vdn"}  # those of test_qmix_vmas.py
METHODS = sorted({path.stem for path in (RECIPES / "config" / "loss").glob("*.yaml")} - VALUE_BASED)
_TABLE = (RECIPES.parent / "README.md").read_text().split("## Methods")[1].split("##")[0]
_ROWS = [row.split("|") for row in _TABLE.splitlines() if row.startswith("| [")]
RECIPE_OF = {  # as the README's table says; methods that are not in it are mars_vmas.py's
    **dict.fromkeys(METHODS, "mars_vmas"),
    **{method: re.findall(r"`(\w+)\.py`", row[4])[0] for row in _ROWS for method in re.findall(r"`(\w+)`", row[3])},
}
ENVIRONMENTS = {path.stem: OmegaConf.load(path) for path in (RECIPES / "config" / "env").glob("*.yaml")}
GAMES = {
    name: cfg
    for name, cfg in sorted(ENVIRONMENTS.items())
    if "_target_" in cfg and get_object(cfg._target_).__module__.startswith("torchrl_marl.envs.games")
}
TINY = [
    "env.num_envs=8",
    "env.max_steps=10",
    "frames_per_batch=80",
    "minibatch_size=40",
    "epochs=2",
    "total_frames=240",
    "evaluation.interval=80",
    "evaluation.episodes=4",
    "evaluation.video=false",
    "actor.hidden_sizes=[16]",
    "critic.hidden_sizes=[16]",
    "logger.wandb_project=null",
    "device=cpu",
]


def run_recipe(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str, recipe: str = "mars_vmas") -> None:
    """Run a recipe within this process."""
    flags = [override for override in overrides if override.startswith("-")]  # Hydra wants them first
    rest = [override for override in overrides if not override.startswith("-")]
    monkeypatch.setattr(sys, "argv", [recipe, *flags, *sizes(recipe, *overrides), f"folder={folder}", *rest])
    monkeypatch.syspath_prepend(str(RECIPES))  # as Python does for a script
    runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")


def sizes(recipe: str, *overrides: str) -> list[str]:
    """What of ``TINY`` a recipe reads."""
    if recipe == "seps":
        return [size for size in TINY if size.startswith(("env.", "frames_per_batch", "actor.", "device"))]
    joint = {"actor=mat", "actor=sable"} & set(overrides)
    has_critic = recipe not in ("magpo_vmas", "qmix_vmas")
    unread = ("critic.", "actor.hidden_sizes") if joint else () if has_critic else ("critic.",)
    return [size for size in TINY if not size.startswith(unread)]


def start_recipe(folder: Path, *overrides: str, recipe: str = "mars_vmas") -> subprocess.Popen:
    """Start a recipe as a process."""
    command = [
        sys.executable,
        str(RECIPES / f"{recipe}.py"),
        *sizes(recipe, *overrides),
        f"folder={folder}",
        *overrides,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_folders(folder: Path) -> list[Path]:
    """Folders of the runs below ``folder``, oldest first."""
    return sorted((path.parent for path in folder.rglob("config.yaml")), key=lambda path: path.stat().st_mtime)


def curves(folder: Path) -> dict[str, str]:
    """Every logged metric of a run but the timers, as rows ``frames,value``."""
    return {
        name: "".join(f"{frames:.0f},{value}\n" for frames, value in zip(*measured, strict=True))
        for name, measured in read_metrics(folder).items()
        if "timers" not in name
    }
