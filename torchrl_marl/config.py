"""Recipes' command lines: Hydra overrides whose every key is checked, and resuming with a stored configuration."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeGuard, get_args

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from typing_extensions import get_type_hints

from torchrl_marl.checkpoints import check_resumable, find_checkpoint, read_metadata
from torchrl_marl.objectives import CTDSLoss, MAGPOLoss, MARPOLoss, RatioLoss, SequentialLoss
from torchrl_marl.trust import foreign_code

__all__ = ["recipe"]

# What a resumed run may change. A checkpoint holds the optimiser's settings and the loss's coefficients, so that other
# overrides would be recorded but not take effect.
_RESUMABLE = {"total_frames", "evaluation", "logger", "device", "num_threads", "compile", "folder"}

# Losses that minibatches of a batch are not enough for: a loop that can do more has to name them.
_NEED_MORE = (SequentialLoss, MARPOLoss, MAGPOLoss, CTDSLoss)


def recipe(
    config_folder: Path, name: str, *, losses: tuple[type, ...] = (RatioLoss,)
) -> Callable[[Callable[[DictConfig], float]], Callable[..., None]]:
    """Turn ``function(cfg)`` into the main function of a recipe script.

    The function gets ``config_folder/name.yaml`` composed with the command line's Hydra overrides (``-m`` runs grids).
    What a YAML node with a ``_target_`` does not list can be overridden without a ``+`` if the target takes it:
    defaults live in the class. A key that nothing reads ends the program with the nearest names, and so do values out
    of range and losses that the loop is not made for. ``resume=PATH`` replaces the configuration by the one stored in a
    checkpoint; other overrides may then change how long the run goes on and how it is watched, not what is trained.

    Args:
        config_folder: folder of the recipes' YAML files.
        name: file name without ``.yaml``.
        losses: what the loop trains; :class:`~torchrl_marl.objectives.RatioLoss` leaves out those of its subclasses
            that need loops of their own, unless they are named as well.

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
            check_loss(resolved, losses, config_folder)
            check_keys(resolved, known)
            check_values(resolved)
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
    known = arguments_of(get_object(target)) if target else reference
    keys = [key for key in cfg if not str(key).startswith("_")]
    foreign = [f"~{path}{key}" for key in keys if key in reference and key not in known]
    if foreign:
        raise SystemExit(f"{target} does not take all that the recipe sets; leave it out with {' '.join(foreign)}")
    for key in keys:
        if key not in known:
            reader = f"an argument of {target}" if target else "a key of the configuration"
            _fail(f"{path}{key}", reader, [f"{path}{name}" for name in known])
        if isinstance(cfg[key], DictConfig) and "_target_" in cfg[key]:
            check_keys(cfg[key], reference.get(key) or DictConfig({}), f"{path}{key}.")
        elif isinstance(cfg[key], DictConfig) and isinstance(reference.get(key), DictConfig) and not target:
            check_keys(cfg[key], reference[key], f"{path}{key}.")


def arguments_of(target: Callable[..., Any]) -> list[str]:
    """Names of the arguments of a function or class, with those of a ``TypedDict`` (``**options: Unpack[...]``)."""
    names = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            names.append(parameter.name)
            continue
        function = target.__init__ if isinstance(target, type) else target
        for options in get_args(get_type_hints(function).get(parameter.name)):
            names += get_type_hints(options)
    return names


def check_loss(cfg: DictConfig, losses: tuple[type, ...], folder: Path) -> None:
    """End the program if the loop is not made for the loss, which it might train as something else without an error.

    Args:
        cfg: the configuration.
        losses: see :func:`recipe`.
        folder: of the recipes' YAML files.

    Raises:
        SystemExit: with the choices of ``loss=`` that the loop trains.
    """
    if not _trains(losses, cfg.loss):
        files = {name: _load(folder / "loss", name) for name in sorted(_groups(folder)["loss"])}
        fitting = [name for name, node in files.items() if _trains(losses, node.get("loss", node))]
        raise SystemExit(
            f"{cfg.recipe} does not train {cfg.loss._target_.rpartition('.')[2]}, which needs another loop; it takes "
            f"loss={', '.join(fitting)}. The README's table of methods says which recipe trains which loss."
        )


def _trains(losses: tuple[type, ...], node: DictConfig) -> bool:
    loss = get_object(node._target_)
    foreign = tuple(other for other in _NEED_MORE if other not in losses)
    return not isinstance(loss, type) or (issubclass(loss, losses) and not issubclass(loss, foreign))


def check_values(cfg: DictConfig) -> None:
    """End the program if a number of the loop is out of its range, before anything is built.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """

    def is_positive(value: object) -> bool:
        return _is_integer(value) and value >= 1

    loop = ("total_frames", "frames_per_batch", "epochs", "num_threads")
    for key in (*loop, "env.num_envs", "evaluation.interval", "evaluation.episodes"):
        _check(cfg, key, "an integer of at least 1", is_positive)
    size = f"an integer from 1 to frames_per_batch, {cfg.frames_per_batch}"
    _check(cfg, "minibatch_size", size, lambda value: is_positive(value) and value <= cfg.frames_per_batch)
    for key in ("gamma", "lmbda"):
        _check(cfg, key, "between 0 and 1", lambda value: isinstance(value, int | float) and 0 <= value <= 1)
    _check(cfg, "compile", "true or false", lambda value: isinstance(value, bool))
    _check(cfg, "chunk_length", "null or an integer of at least 1", lambda value: value is None or is_positive(value))
    for seed in cfg.seed if isinstance(cfg.seed, ListConfig) else [cfg.seed]:
        if not _is_integer(seed) or seed < 0:
            raise SystemExit(f"seed must be an integer of at least 0, in recipes/seeds.py a list of them; got {seed}.")
    check_device(cfg.device)


def check_device(device: str | None) -> None:
    """End the program if Torch cannot use a device here.

    Raises:
        SystemExit: with what can be used.
    """
    try:
        available = torch.device(device or "cpu").type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise SystemExit(f"device={device} is none of Torch's: {str(error).splitlines()[0]}") from None
    if not available:
        raise SystemExit(f"device={device} needs CUDA, which Torch does not find here; device=cpu runs anywhere.")


def _check(cfg: DictConfig, key: str, allowed: str, is_allowed: Callable[[Any], bool]) -> None:
    if not is_allowed(value := OmegaConf.select(cfg, key)):
        hint = (
            f" Write {value:.0f}." if isinstance(value, float) and value.is_integer() and is_allowed(int(value)) else ""
        )
        raise SystemExit(f"{key} must be {allowed}; got {value}.{hint}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_override(argument: str, folder: Path, name: str) -> str:
    """Check the root of an override by name; let a new key below it through to ``check_keys``."""
    if argument.startswith("hydra/launcher=submitit") and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise SystemExit(f'{argument} needs the launcher: pip install "torchrl_marl[scale]"')
    match = re.fullmatch(r"(\+{0,2})([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", argument, flags=re.DOTALL)
    if match is None or match[2] == "hydra":
        return argument
    plus, root, below, value = match.groups()
    groups = _groups(folder)
    if root not in groups and root not in _load(folder, name):
        _fail(root + below, "a key of the configuration", [*groups, *map(str, _load(folder, name))])
    if below:
        return argument if plus else f"++{argument}"
    if root in groups and re.fullmatch(r"\w+(\s*,\s*\w+)*", value):  # Hydra checks choice(...) and the like itself
        for choice in re.split(r"\s*,\s*", value):
            if choice not in groups[root]:
                _fail(f"{root}={choice}", "a choice", [f"{root}={known}" for known in sorted(groups[root])])
    return argument


def _stored_config(resume: str, overrides: Iterable[str]) -> DictConfig:
    try:
        checkpoint = find_checkpoint(resume)
        config = read_metadata(checkpoint)["config"]
        foreign = foreign_code(config)
        check_resumable(checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"resume={resume}: {error}") from error
    stored = DictConfig(config)
    overridden = set()
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        value = OmegaConf.create(f"value: {text}").value
        if key in foreign and foreign[key] == value:
            del foreign[key]
            continue
        if key != "resume" and key.split(".")[0] not in _RESUMABLE:
            allowed = ", ".join(sorted(_RESUMABLE))
            raise SystemExit(f"{override}: a resumed run keeps its {key.lstrip('~')}; what can change is {allowed}.")
        overridden.add(key)
        OmegaConf.update(stored, key, value)
    if foreign:
        named = " ".join(f"{key}={value}" for key, value in foreign.items())
        raise SystemExit(
            f"resume={resume}: {checkpoint} names code that is not this library's; if you trust it, say again: {named}"
        )
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
    raise SystemExit(f"{key} is not {what}; nearest: {', '.join(nearest)}.")
