"""Command lines of recipes: checked Hydra overrides, and resuming with a stored configuration."""

from __future__ import annotations

import functools
import linecache
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from torchrl_marl.compilation import keep_compiled_code
from torchrl_marl.run import checks
from torchrl_marl.run.checkpoints import check_resumable, find_checkpoint, read_metadata
from torchrl_marl.run.compiling import choose_compilation
from torchrl_marl.run.logger import MetricLog
from torchrl_marl.run.names import checked_override, config_groups, load_config
from torchrl_marl.run.settings import check_setting, read_settings, store_settings
from torchrl_marl.shelf import recipe_command
from torchrl_marl.trust import foreign_code

__all__ = ["Recipe", "end_if_refused", "recipe"]

# Settings that a resumed run may change. A checkpoint holds the optimiser's settings and the loss's coefficients, so
# other overrides would be recorded without effect.
_RESUMABLE = {"total_frames", "evaluation", "logger", "device", "num_threads", "compile", "folder"}

_INTERVAL = 30_000  # frames between evaluations, or one episode of all environments where that is more
_FULL_ERROR = "HYDRA_FULL_ERROR"


def _iterations(_root_: DictConfig) -> int:
    """How many batches training takes."""
    steps = -(-_root_.frames_per_batch // _root_.env.num_envs)
    return -(-_root_.total_frames // (steps * _root_.env.num_envs * _root_.processes))


OmegaConf.register_new_resolver("iterations", _iterations, replace=True)


def recipe(
    config_folder: Path,
    name: str,
    *,
    networks: tuple[str, ...] = ("actor_network", "critic_network"),
    unread: tuple[str, ...] = (),
) -> Callable[[Callable[[DictConfig], float]], Recipe]:
    """Turn ``function(cfg)`` into the main function of a recipe script.

    The function gets ``config_folder/name.yaml`` composed with the Hydra overrides of the command line (``-m`` runs
    grids, ``+experiment=NAME`` takes the values of ``config_folder/experiment/NAME.yaml``). All arguments of a
    ``_target_`` can be overridden without a ``+``, also those that the YAML node does not list: defaults live in the
    class. Unknown keys end the program with the nearest names; so do values out of range or of another type than the
    target's annotation, and losses that the loop does not support. ``resume=PATH`` replaces the configuration by the
    one stored in a checkpoint; other overrides may then change the length and the logging of the run, but not what is
    trained.

    An error of Hydra, this library or a constructor is printed as one line on stderr, without a traceback. Other errors
    keep the traceback, and with ``HYDRA_FULL_ERROR=1`` in the environment all errors do.

    Args:
        config_folder: folder of the recipes' YAML files.
        name: file name without ``.yaml``.
        networks: networks that the loop builds, which determine the supported losses.
        unread: keys and groups of the YAML file that the loop does not use.

    Returns:
        Decorator that turns the function into a :class:`Recipe`.
    """
    return lambda function: Recipe(function, config_folder, name, networks=networks, unread=unread)


class Recipe:
    """A training function with a command line, built by :func:`recipe`; a call reads ``sys.argv``."""

    def __init__(
        self,
        train: Callable[[DictConfig], float],
        folder: Path,
        name: str,
        *,
        networks: tuple[str, ...],
        unread: tuple[str, ...],
    ) -> None:
        self.train = train
        self._folder, self._name, self._networks, self._unread = folder, name, networks, unread

    def __call__(self) -> None:
        """Train with the overrides in ``sys.argv``."""
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(self._help([word for word in sys.argv[1:] if not word.startswith("-")]))
            return None
        full_error = os.environ.get(_FULL_ERROR) == "1"

        @functools.wraps(self.train)
        def run(cfg: DictConfig) -> float:
            try:
                checked = self._checked(cfg)
                if checked.resume is None and cfg.compile == "auto" and "compile" not in self._unread:
                    print(choose_compilation(checked)[1])
                return self.train(checked)
            except Exception as error:
                if not full_error and HydraConfig.get().mode == RunMode.RUN:
                    # handled here, as Hydra prints another line about a failed job
                    end_if_refused(error, self.train.__module__)
                raise

        keep_compiled_code()
        sys.argv[1:] = map(self._checked_override, sys.argv[1:])
        logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notices would break the progress bar
        logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # errors are said once, in one line
        start = hydra.main(version_base=None, config_path=str(self._folder), config_name=self._name)(run)
        if full_error:
            return start()
        os.environ[_FULL_ERROR] = "1"  # or Hydra would print errors and exit before they get here
        try:
            start()
        except Exception as error:
            end_if_refused(error, self.train.__module__)
            raise
        finally:
            del os.environ[_FULL_ERROR]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Return the configuration of a command line with these overrides, without grids.

        Raises:
            SystemExit: with the error message of the command line, if an override is invalid.
        """
        words = list(map(self._checked_override, overrides))
        with hydra.initialize_config_dir(str(self._folder), job_name=self._name, version_base=None):
            try:
                composed = hydra.compose(self._name, words, return_hydra_config=True)
            except CompactHydraException as error:
                raise SystemExit(checks.in_one_line(error)) from error
        HydraConfig.instance().set_config(composed)  # the run reads its command line from here
        return self._checked(DictConfig({key: composed._get_node(key) for key in composed if key != "hydra"}))

    def _checked(self, cfg: DictConfig) -> DictConfig:
        """Return the composed configuration, or the one to resume, after all checks."""
        overrides = HydraConfig.get().overrides.task
        own = load_config(self._folder, str(HydraConfig.get().job.config_name))
        groups = config_groups(self._folder)
        try:
            resolved = DictConfig(OmegaConf.to_container(cfg, resolve=True))
        except OmegaConfBaseException as error:
            raise SystemExit(checks.in_one_line(error)) from error
        checks.check(resolved, "recipe", f"what the script is called, {own.recipe}", lambda value: value == own.recipe)
        checks.check_choices(resolved, overrides, groups, self._folder)
        checks.check(resolved, "resume", "null, a checkpoint or the folder of a run", checks.is_text_or_null)
        if resolved.resume is not None:
            stored = _stored_config(resolved.resume, overrides)
            if missing := ", ".join(str(key) for key in resolved if key not in stored):
                raise SystemExit(
                    f"{stored.resume} says nothing of {missing}: it is older than that, or another recipe's, and "
                    "cannot go on here. Its policy can be used: load_policy, python -m torchrl_marl evaluate."
                )
            if stored.recipe != own.recipe and (self._folder / f"{stored.recipe}.yaml").exists():
                raise SystemExit(
                    f"{stored.resume} is of a run of {stored.recipe}: {' '.join(recipe_command(stored.recipe))} "
                    f"resume={resolved.resume}"
                )
            resolved = stored
        known = DictConfig({**{group: {} for group in groups}, **own})
        checks.check_nodes(
            resolved, DictConfig({key: known[key] for key in known if key not in groups or resolved.get(key)})
        )
        checks.check_values(resolved, self._unread)
        if "evaluation" not in self._unread and resolved.evaluation.interval is None:
            episode = resolved.processes * resolved.env.num_envs * resolved.env.max_steps
            resolved.evaluation.interval = max(_INTERVAL, episode)
        checks.check_loss(resolved, self._networks, self._folder)
        if resolved.resume is None:
            check_setting(resolved, HydraConfig.get().runtime.choices, self._folder)
        checks.check_keys(resolved, known)
        checks.check_types(resolved.logger, MetricLog, "logger.")
        if resolved.compile == "auto" and "compile" not in self._unread:
            resolved.compile, _ = choose_compilation(resolved)
        return resolved

    def _checked_override(self, argument: str) -> str:
        """Check the root key and the choice of an override; keys below are checked by ``check_keys``."""
        if (
            argument.startswith("hydra/launcher=submitit")
            and find_spec("hydra_plugins.hydra_submitit_launcher") is None
        ):
            raise SystemExit(f'{argument} needs the launcher: pip install "torchrl_marl[scale]"')
        name, known = self._name, [*config_groups(self._folder), *map(str, load_config(self._folder, self._name))]
        if (removed := re.fullmatch(r"~([A-Za-z_]\w*)(=.*)?", argument)) and removed[1] in known:
            raise SystemExit(
                f"{argument}: {name} needs {removed[1]}; it can be changed ({removed[1]}=...), not left out."
            )
        word = checked_override(self._folder, name, argument)
        root = re.split(r"[.=]", argument.lstrip("+"), maxsplit=1)[0]
        if root in self._unread:
            raise SystemExit(f"{argument} has no effect: {name} has no use for {root}; leave it out.")
        if root == "setting":
            store_settings(self._folder, argument, self._takes_setting)
        return word

    def _help(self, overrides: Sequence[str]) -> str:
        """What can be chosen here, and all that these overrides come to, with what the classes take beyond it."""
        cfg, own = self.compose(overrides), load_config(self._folder, self._name)
        groups = config_groups(self._folder)
        keys = {*map(str, own), *(group for group in groups if group in cfg), "experiment", "setting"}
        keys -= {"defaults", *self._unread}
        lines = [sys.modules["__main__"].__doc__ or "", "Choices (GROUP=CHOICE):"]
        for group, choices in sorted(groups.items()):
            if group not in keys:
                continue
            fitting = [choice for choice in sorted(choices) if self._fits(group, choice, keys)]
            if group == "setting":
                fitting += dict.fromkeys(f"{name.partition('/')[0]}/TASK" for name in read_settings(self._folder))
                fitting = [name for name in fitting if name.partition("/")[0] in fitting]
            lines.append(f"  {group}: {', '.join(fitting) or 'none'}")
        shown = {str(key): checks.with_defaults(value) for key, value in cfg.items() if key in keys}
        lines += ["\nValues (KEY.KEY=VALUE), those of classes among them:", OmegaConf.to_yaml(shown)]
        return "\n".join(lines)

    def _fits(self, group: str, choice: str, keys: set[str]) -> bool:
        """Whether this loop can train what a choice names, by what it sets and by its own choices of other groups."""
        node = DictConfig(OmegaConf.load(self._folder / group / f"{choice}.yaml"))
        defaults, own = node.get("defaults", []), load_config(self._folder, self._name).get(group, {})
        for entry in defaults:
            if str(entry).endswith(f"@{group}"):  # the file of another group, put in this place
                node[group] = OmegaConf.load(self._folder / f"{str(entry).strip('/').partition('@')[0]}.yaml")
        target = node.get(group, node).get("_target_")
        taken = set(map(str, own)) if target is None else {*checks.arguments_of(get_object(target)), "_target_"}
        groups = set() if "_target_" in node else set(map(str, node)) & set(config_groups(self._folder))
        fits = self._takes_setting(choice) if group == "loss" else set(map(str, own)) <= taken and groups <= keys
        overrides = [entry for entry in defaults if isinstance(entry, DictConfig)]
        chosen = [(str(key).rpartition("/")[2], value) for entry in overrides for key, value in entry.items()]
        return fits and all(self._fits(other, value, keys) for other, value in chosen if other in keys)

    def _takes_setting(self, loss: str) -> bool:
        node = load_config(self._folder / "loss", loss)
        return checks.trains(self._networks, node.get("loss", node))


def end_if_refused(error: Exception, script: str) -> None:
    """End the program with one line if Hydra, this library or a constructor has rejected its input.

    Rejections are errors of ``raise`` statements in this package, the script or code that Hydra instantiates, and
    arguments that do not match a target. Errors raised by Python itself or by Torch's kernels are not rejections.
    """
    key, cause = "", error
    if isinstance(error, InstantiationException):
        match = re.search(r"full_key: (\S+)", str(error))
        key = f"{match[1]}: " if match else ""
        while isinstance(cause, InstantiationException) and isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
    checked = isinstance(cause, ValueError | TypeError | ImportError | FloatingPointError)
    no_memory = isinstance(cause, torch.OutOfMemoryError) or "can't allocate memory" in str(cause)
    others = isinstance(cause, CompactHydraException) or no_memory
    if others or (checked and _is_refusal(cause, script, inside=cause is not error)):
        called = re.search(r"full_key: (\S+)[\s\S]*missing \d+ required positional", f"{error} {cause}")
        hint = f". To hand the function on, uncalled: {called[1]}._partial_=true" if called else ""
        raise SystemExit(key + checks.in_one_line(cause) + hint) from error


def _is_refusal(error: Exception, script: str, *, inside: bool) -> bool:
    """Whether a ``raise`` of this package or script raised the error; ``inside`` Hydra's targets, of any package."""
    if error.__traceback__ is None:
        return False
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    if inside and package == "hydra":  # Hydra called the target with wrong arguments
        return True
    statement = linecache.getline(frame.f_code.co_filename, line, frame.f_globals).strip()
    return statement.startswith("raise ") and (inside or package in ("torchrl_marl", "hydra_plugins", "hydra", script))


def _stored_config(resume: str, overrides: Iterable[str]) -> DictConfig:
    try:
        checkpoint = find_checkpoint(resume)
        config = read_metadata(checkpoint)["config"]
        foreign = foreign_code(config)
        check_resumable(checkpoint)
    except (OSError, ValueError) as error:
        raise SystemExit(f"resume={resume}: {error}") from error
    stored = DictConfig(config)
    for override in overrides:
        key, _, text = override.lstrip("+").partition("=")
        value = OmegaConf.create(f"value: {text}").value
        if key in foreign and foreign[key] == value:
            del foreign[key]
            continue
        if key != "resume" and key.split(".")[0] not in _RESUMABLE:
            allowed = ", ".join(sorted(_RESUMABLE))
            raise SystemExit(f"{override}: a resumed run keeps its {key.lstrip('~')}; what can change is {allowed}.")
        OmegaConf.update(stored, key, value)
    if foreign:
        named = " ".join(f"{key}={value}" for key, value in foreign.items())
        raise SystemExit(
            f"resume={resume}: {checkpoint} names code that is not this library's; if you trust it, say again: {named}"
        )
    stored.resume = str(checkpoint)
    return stored
