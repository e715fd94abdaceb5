"""Recipes' command lines: Hydra overrides whose every key is checked, and resuming with a stored configuration."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from torchrl_marl.checkpoints import find_checkpoint, read_metadata

__all__ = ["recipe"]

# What a resumed run may change. A checkpoint holds the optimiser's settings and the loss's coefficients, so that other
# overrides would be recorded but not take effect.
_RESUMABLE = {"total_frames", "evaluation", "logger", "device", "num_threads", "compile", "folder"}


def recipe(config_folder: Path, name: str) -> Callable[[Callable[[DictConfig], float]], Callable[..., None]]:
    """Turn ``function(cfg)`` into the main function of a recipe script.

    The function gets ``config_folder/name.yaml`` composed with the command line's Hydra overrides (``-m`` runs grids).
    What a YAML node with a ``_target_`` does not list can be overridden without a ``+`` if the target takes it:
    defaults live in the class. A key that nothing reads ends the program with the nearest names. ``resume=PATH``
    replaces the configuration by the one stored in a checkpoint; other overrides may then change how long the run
    goes on and how it is watched, not what is trained.

    Args:
        config_folder: folder of the recipes' YAML files.
        name: file name without ``.yaml``.

    Returns:
        Decorator; the decorated function reads ``sys.argv``. Its one argument, another file's name, may be left out: a
        script can be the loop of another one with values of its own.
    """

    def decorate(function: Callable[[DictConfig], float]) -> Callable[[], None]:
        @functools.wraps(function)
        def run(cfg: DictConfig) -> float:
            resolved = DictConfig(OmegaConf.to_container(cfg, resolve=True))
            if resolved.resume is not None:
                stored = _stored_config(resolved.resume, HydraConfig.get().overrides.task)
                if missing := ", ".join(str(key) for key in resolved if key not in stored):
                    raise SystemExit(
                        f"{stored.resume} says nothing of {missing}: it is older than that, or another recipe's, and "
                        "cannot go on here. Its policy can be used: load_policy, python -m torchrl_marl evaluate."
                    )
                resolved = stored
            own = _load(config_folder, str(HydraConfig.get().job.config_name))
            known = DictConfig({**dict.fromkeys(_groups(config_folder)), **own})
            check_keys(resolved, known)
            return function(resolved)

        def main(config_name: str = name) -> None:
            sys.argv[1:] = [_checked_override(argument, config_folder, config_name) for argument in sys.argv[1:]]
            logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notices would break the progress bar
            hydra.main(version_base=None, config_path=str(config_folder), config_name=config_name)(run)()

        return main

    return decorate


def check_keys(cfg: DictConfig, reference: DictConfig, path: str = "") -> None:
    """End the program if the configuration holds a key that nothing reads.

    Args:
        cfg: the configuration; the keys of a node with a ``_target_`` must be arguments of that target.
        reference: what the recipe's own YAML file holds; other nodes must have keys of it.
        path: dotted path of ``cfg`` within the whole configuration.

    Raises:
        SystemExit: with the key and the nearest names, or with the overrides that leave out what the YAML file holds
            for another target.
    """
    target = cfg.get("_target_")
    known = inspect.signature(get_object(target)).parameters if target else reference
    keys = [key for key in cfg if not str(key).startswith("_")]
    foreign = [f"~{path}{key}" for key in keys if key in reference and key not in known]
    if foreign:
        raise SystemExit(f"{target} does not take all that the recipe sets; leave it out with {' '.join(foreign)}")
    for key in keys:
        if key not in known:
            reader = f"argument of {target}" if target else "key of the configuration"
            _fail(f"{path}{key}", reader, [f"{path}{name}" for name in known])
        if isinstance(cfg[key], DictConfig) and "_target_" in cfg[key]:
            check_keys(cfg[key], reference.get(key) or DictConfig({}), f"{path}{key}.")
        elif isinstance(cfg[key], DictConfig) and isinstance(reference.get(key), DictConfig) and not target:
            check_keys(cfg[key], reference[key], f"{path}{key}.")


def _checked_override(argument: str, folder: Path, name: str) -> str:
    """Check the root of an override by name; let a new key below it through to ``check_keys``."""
    match = re.fullmatch(r"(\+{0,2})([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", argument, flags=re.DOTALL)
    if match is None or match[2] == "hydra":
        return argument
    plus, root, below, value = match.groups()
    groups = _groups(folder)
    if root not in groups and root not in _load(folder, name):
        _fail(root + below, "key of the configuration", [*groups, *map(str, _load(folder, name))])
    if below:
        return argument if plus else f"++{argument}"
    if root in groups and re.fullmatch(r"\w+(\s*,\s*\w+)*", value):  # Hydra checks choice(...) and the like itself
        for choice in re.split(r"\s*,\s*", value):
            if choice not in groups[root]:
                _fail(f"{root}={choice}", "choice", [f"{root}={known}" for known in sorted(groups[root])])
    return argument


def _stored_config(resume: str, overrides: Iterable[str]) -> DictConfig:
    checkpoint = find_checkpoint(resume)
    stored = DictConfig(read_metadata(checkpoint)["config"])
    overridden = set()
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key != "resume" and key.split(".")[0] not in _RESUMABLE:
            allowed = ", ".join(sorted(_RESUMABLE))
            raise SystemExit(f"{override}: a resumed run keeps its {key.lstrip('~')}; what can change is {allowed}.")
        overridden.add(key)
        OmegaConf.update(stored, key, OmegaConf.create(f"value: {value}").value)
    for node in (stored.get("env"), OmegaConf.select(stored, "collector.make_env.config")):
        if "compile" in overridden and node is not None and "compile" in node:
            node.compile = stored.compile  # VMAS follows it, as in a new run
    stored.resume = str(checkpoint)
    return stored


@functools.cache
def _groups(folder: Path) -> dict[str, list[str]]:
    """Configuration groups and their choices."""
    return {path.name: [file.stem for file in path.glob("*.yaml")] for path in folder.iterdir() if path.is_dir()}


@functools.cache
def _load(folder: Path, name: str) -> DictConfig:
    """A recipe's own file on top of the recipes that its ``defaults`` name."""
    own = DictConfig(OmegaConf.load(folder / f"{name}.yaml"))
    recipes = [entry for entry in own.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return DictConfig(OmegaConf.merge(*(_load(folder, recipe) for recipe in recipes), own))


def _fail(key: str, what: str, known: Iterable[str]) -> NoReturn:
    known = list(dict.fromkeys(known))
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.4) or sorted(known)
    raise SystemExit(f"{key} is not a {what}; nearest: {', '.join(nearest)}.")
