"""Names on the command line of a recipe: checked before the imports that take seconds, Torch's and TorchRL's."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from torchrl_marl.run.settings import check_setting, read_settings, store_settings
from torchrl_marl.signatures import nearest, source_arguments

__all__ = ["check_known", "check_names", "checked_override", "config_groups", "fail", "load_config"]

_ADAPTIVE = "the default collector adapts to the loss and the environment"
_GONE = {
    "collector=compiled": f"compile=true compiles collection, too: {_ADAPTIVE}",
    "collector=sequences": f"leave it out: {_ADAPTIVE}",
}


def check_names(script: str) -> None:
    """End the program if ``sys.argv`` has a key or a choice that the recipe does not know, without importing Torch.

    Of a grid, the first run is checked. What takes an import to tell, and keys of nodes with ``resume=``, are left to
    :func:`torchrl_marl.run.recipe`, which checks everything.

    Args:
        script: file of the recipe, beside the folder ``config``.

    Raises:
        SystemExit: with the key or the choice and the nearest names.
    """
    folder, name = Path(script).resolve().parent / "config", Path(script).stem
    if {"-h", "--help"} & set(sys.argv[1:]) or not (folder / f"{name}.yaml").exists():  # renamed
        return
    words = [checked_override(folder, name, word) for word in sys.argv[1:] if word not in ("-m", "--multirun")]
    if any(word.lstrip("+").startswith(("-", "resume=")) for word in words):
        return
    try:
        words = list(map(_first_of_sweep, words)) if len(words) < len(sys.argv) - 1 else words
        settings = [word for word in words if word.startswith("setting=")]
        for word in settings:
            store_settings(folder, word, lambda loss: True)
        if settings:
            _check_composed(folder, name, settings)
    except (Exception, SystemExit):  # said by the command line itself, as that a setting is another recipe's
        return
    _check_composed(folder, name, words)


def _check_composed(folder: Path, name: str, words: Sequence[str]) -> None:
    try:
        with hydra.initialize_config_dir(str(folder), job_name=name, version_base=None):
            composed = hydra.compose(name, list(words), return_hydra_config=True)
        check_setting(composed, composed.hydra.runtime.choices, folder)
        cfg: Any = OmegaConf.to_container(composed)
    except Exception:  # said by the command line itself
        return
    groups = config_groups(folder)
    built = {key: node for key, node in cfg.items() if key not in groups or "_target_" in (node or ())}
    del built["hydra"]
    known: Any = OmegaConf.to_container(load_config(folder, name))
    check_known(built, {**{group: {} for group in groups}, **known}, lambda target, _: source_arguments(target))


def checked_override(folder: Path, name: str, argument: str) -> str:
    """Check the root key and the choice of an override.

    Args:
        folder: folder of the recipes' YAML files.
        name: the recipe's.
        argument: word of the command line.

    Returns:
        The word as Hydra takes it: keys of nodes with a ``++``.

    Raises:
        SystemExit: with the key or the choice and the nearest names.
    """
    match = re.fullmatch(r"(\+{0,2})([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", argument, flags=re.DOTALL)
    if match is None or match[2] == "hydra":
        return argument
    plus, root, below, value = match.groups()
    groups = config_groups(folder)
    known = [*groups, *map(str, load_config(folder, name))]
    if root not in known:
        fail(root + below, "a key of the configuration", known)
    if below:
        return argument if plus else f"++{argument}"
    if root in groups and re.fullmatch(r"[\w/-]+(\s*,\s*[\w/-]+)*", value):  # Hydra checks choice(...) and the like
        choices = [*sorted(groups[root]), *(read_settings(folder) if root == "setting" else ())]
        for choice in re.split(r"\s*,\s*", value):
            _check_choice(root, choice, choices)
    listed = root in ("experiment", "setting")  # by recipes, without a choice
    return argument.lstrip("+") if listed else argument


def check_known(
    cfg: Mapping[Any, Any],
    reference: Mapping[Any, Any],
    arguments_of: Callable[[str, str], Collection[str] | None],
    path: str = "",
) -> None:
    """End the program if the configuration holds an unknown key.

    Args:
        cfg: the configuration; keys of a node with a ``_target_`` must be arguments of the target.
        reference: content of the recipe's YAML file; keys of other nodes must occur there.
        arguments_of: ``arguments_of(target, path)``: names of the arguments of a target; ``None`` checks nothing.
        path: dotted path of ``cfg`` within the whole configuration, with a dot at its end.

    Raises:
        SystemExit: with the key and the nearest names, or with the overrides that remove the YAML file's keys for
            another target.
    """
    target = cfg.get("_target_")
    known = arguments_of(str(target), path) if "_target_" in cfg else reference
    keys = [key for key in cfg if not str(key).startswith("_")]
    foreign = [] if known is None else [f"~{path}{key}" for key in keys if key in reference and key not in known]
    if foreign:
        raise SystemExit(f"{target} does not take all that the recipe sets; leave it out with {' '.join(foreign)}")
    for key in keys:
        if known is not None and key not in known:
            reader = f"an argument of {target}" if target else "a key of the configuration"
            fail(f"{path}{key}", reader, [f"{path}{name}" for name in known])
        if isinstance(cfg[key], Mapping) and (not target or "_target_" in cfg[key]):
            default = reference.get(key)
            check_known(cfg[key], default if isinstance(default, Mapping) else {}, arguments_of, f"{path}{key}.")


def fail(key: str, what: str, known: Iterable[str]) -> NoReturn:
    """End the program with the known names nearest to ``key``."""
    known = list(dict.fromkeys(known))
    similar = nearest(key, known) or sorted(known)
    hint = f"; nearest: {', '.join(similar)}" if similar else ""
    raise SystemExit(f"{key} is not {what}{hint}.")


@functools.cache
def config_groups(folder: Path) -> dict[str, list[str]]:
    """Configuration groups and their choices."""
    return {path.name: [file.stem for file in path.glob("*.yaml")] for path in folder.iterdir() if path.is_dir()}


@functools.cache
def load_config(folder: Path, name: str) -> DictConfig:
    """A recipe's file composed with the files in its ``defaults``."""
    own = DictConfig(OmegaConf.load(folder / f"{name}.yaml"))
    files = [entry for entry in own.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return DictConfig(OmegaConf.merge(*(load_config(folder, file) for file in files), own))


def _first_of_sweep(word: str) -> str:
    """The override of the first run of a grid."""
    override = OverridesParser.create().parse_override(word)
    if not override.is_sweep_override():
        return word
    return f"{word.partition('=')[0]}={next(override.sweep_string_iterator())}"


def _check_choice(group: str, choice: str, choices: Collection[str]) -> None:
    if (chosen := f"{group}={choice}") in _GONE:
        raise SystemExit(f"{chosen} is no choice any more: {_GONE[chosen]}.")
    if choice not in choices:
        fail(chosen, "a choice", [f"{group}={known}" for known in choices])
