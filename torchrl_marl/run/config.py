"""Recipes' command lines: Hydra overrides whose every key is checked, and resuming with a stored configuration."""

from __future__ import annotations

import difflib
import dis
import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeGuard, Union, get_args, get_origin

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import get_type_hints

from torchrl_marl.objectives.minibatches import check_chunks
from torchrl_marl.run.checkpoints import check_resumable, find_checkpoint, read_metadata
from torchrl_marl.run.logger import MetricLog
from torchrl_marl.trust import foreign_code

__all__ = ["Recipe", "end_if_refused", "recipe"]

# What a resumed run may change. A checkpoint holds the optimiser's settings and the loss's coefficients, so that other
# overrides would be recorded but not take effect.
_RESUMABLE = {"total_frames", "evaluation", "logger", "device", "num_threads", "compile", "folder"}

_LARGEST_SEED = 2**32 - 1 - 3_000_009  # evaluation adds up to that, and NumPy takes 32 bits
_FULL_ERROR = "HYDRA_FULL_ERROR"


class Recipe:
    """A training function with a command line; made by :func:`recipe`, whose arguments it takes.

    Called, it reads ``sys.argv``. Its one argument, another file's name, may be left out: a script can be the loop of
    another one with values of its own.
    """

    def __init__(
        self,
        train: Callable[[DictConfig], float],
        folder: Path,
        name: str,
        *,
        networks: tuple[str, ...],
        collectors: tuple[str, ...],
        unread: tuple[str, ...],
    ) -> None:
        self.train = train
        self._folder, self._name = folder, name
        self._networks, self._collectors, self._unread = networks, collectors, unread

    def __call__(self, config_name: str | None = None) -> None:
        """Train with the overrides in ``sys.argv``."""
        full_error = os.environ.get(_FULL_ERROR) == "1"

        @functools.wraps(self.train)
        def run(cfg: DictConfig) -> float:
            try:
                return self.train(self._checked(cfg))
            except Exception as error:
                if not full_error and HydraConfig.get().mode == RunMode.RUN:
                    # here, as Hydra prints a line of its own about a job that fails
                    end_if_refused(error, self.train.__module__)
                raise

        name = config_name or self._name
        sys.argv[1:] = [_checked_override(word, self._folder, name, self._unread) for word in sys.argv[1:]]
        logging.getLogger("torchrl").setLevel(logging.WARNING)  # its notices would break the progress bar
        start = hydra.main(version_base=None, config_path=str(self._folder), config_name=name)(run)
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
        """Return what the command line with these overrides, none of which is a grid, would train.

        Raises:
            SystemExit: in the words of the command line, if it would refuse them.
        """
        words = [_checked_override(word, self._folder, self._name, self._unread) for word in overrides]
        with hydra.initialize_config_dir(str(self._folder), job_name=self._name, version_base=None):
            try:
                composed = hydra.compose(self._name, words, return_hydra_config=True)
            except CompactHydraException as error:
                raise SystemExit(_in_one_line(error)) from error
        HydraConfig.instance().set_config(composed)  # what the run then knows of its command line
        return self._checked(DictConfig({key: composed._get_node(key) for key in composed if key != "hydra"}))

    def _checked(self, cfg: DictConfig) -> DictConfig:
        resolved, known = _resolved(cfg, self._folder)
        several_seeds = isinstance(_load(self._folder, self._name).seed, ListConfig)
        check_values(resolved, several_seeds=several_seeds, unread=self._unread)
        check_loss(resolved, self._networks, self._folder)
        check_collector(resolved, self._collectors, self._folder)
        check_keys(resolved, known)
        check_types(resolved.logger, MetricLog, "logger.")
        return resolved


def recipe(
    config_folder: Path,
    name: str,
    *,
    networks: tuple[str, ...] = ("actor_network", "critic_network"),
    collectors: tuple[str, ...] = ("default", "compiled", "multiprocess", "ray"),
    unread: tuple[str, ...] = (),
) -> Callable[[Callable[[DictConfig], float]], Recipe]:
    """Turn ``function(cfg)`` into the main function of a recipe script.

    The function gets ``config_folder/name.yaml`` composed with the command line's Hydra overrides (``-m`` runs grids).
    What a YAML node with a ``_target_`` does not list can be overridden without a ``+`` if the target takes it:
    defaults live in the class. A key that nothing reads ends the program with the nearest names, and so do values out
    of range, values of another type than the target's annotation, and what the loop is not made for. ``resume=PATH``
    replaces the configuration by the one stored in a checkpoint; other overrides may then change how long the run goes
    on and how it is watched, not what is trained.

    What Hydra, this library or a constructor refuses is one line on stderr, without a traceback; other errors keep
    theirs, and with ``HYDRA_FULL_ERROR=1`` in the environment all do.

    Args:
        config_folder: folder of the recipes' YAML files.
        name: file name without ``.yaml``.
        networks: what the loop builds; it trains the losses that are made of these.
        collectors: choices of ``collector=`` that the loop can use.
        unread: keys of the YAML file, and groups, that the loop has no use for.

    Returns:
        Decorator that makes a :class:`Recipe` of the function.
    """
    return lambda function: Recipe(
        function, config_folder, name, networks=networks, collectors=collectors, unread=unread
    )


def _resolved(cfg: DictConfig, folder: Path) -> tuple[DictConfig, DictConfig]:
    """Return what to train, the composed configuration or the one to resume, and what the recipe's YAML file holds."""
    overrides = HydraConfig.get().overrides.task
    own = _load(folder, str(HydraConfig.get().job.config_name))
    try:
        resolved = DictConfig(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise SystemExit(_in_one_line(error)) from error
    _check(resolved, "recipe", f"what the script is called, {own.recipe}", lambda value: value == own.recipe)
    check_choices(resolved, overrides, folder)
    _check(resolved, "resume", "null, a checkpoint or the folder of a run", _is_text_or_null)
    if resolved.resume is not None:
        stored = _stored_config(resolved.resume, overrides)
        if missing := ", ".join(str(key) for key in resolved if key not in stored):
            raise SystemExit(
                f"{stored.resume} says nothing of {missing}: it is older than that, or another recipe's, and "
                "cannot go on here. Its policy can be used: load_policy, python -m torchrl_marl evaluate."
            )
        resolved = stored
    known = DictConfig({**{group: {} for group in _groups(folder)}, **own})
    check_nodes(resolved, known)
    return resolved, known


def end_if_refused(error: Exception, script: str) -> None:
    """End the program with one line if Hydra, this library or a constructor has refused what it was given.

    That is what a ``raise`` statement of this package or of the script says, or one of whatever Hydra instantiates, and
    arguments that do not fit a target; errors that Python itself or Torch's kernels raise are nobody's check.
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
        raise SystemExit(key + _in_one_line(cause)) from error


def _is_refusal(error: Exception, script: str, *, inside: bool) -> bool:
    """Whether a ``raise`` of this package or script raised it; ``inside`` what Hydra instantiates, of any package."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
    if inside and package == "hydra":  # which called the target with arguments that it does not take
        return True
    stated = trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return stated and (inside or package in ("torchrl_marl", "hydra", script))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).partition("\nConfig search path")[0].split())


def check_choices(cfg: DictConfig, overrides: Iterable[str], folder: Path) -> None:
    """End the program if a group's choice has no effect, as the recipe sets what it would.

    Raises:
        SystemExit: with the choice and what the recipe sets.
    """
    words = (override.lstrip("+").partition("=") for override in overrides)
    chosen = {key: value for key, _, value in words}
    for group, choices in _groups(folder).items():
        if chosen.get(group) not in choices or f"{group}._target_" in chosen:
            continue
        file = OmegaConf.load(folder / group / f"{chosen[group]}.yaml")
        target = OmegaConf.select(file, f"{group}._target_") or OmegaConf.select(file, "_target_")
        if target not in (None, found := OmegaConf.select(cfg, f"{group}._target_")):
            raise SystemExit(f"{group}={chosen[group]} has no effect: {cfg.recipe} sets {group} to {found}.")


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
    known = arguments_of(_located(target, path)) if "_target_" in cfg else reference
    keys = [key for key in cfg if not str(key).startswith("_")]
    foreign = [f"~{path}{key}" for key in keys if key in reference and key not in known]
    if foreign:
        raise SystemExit(f"{target} does not take all that the recipe sets; leave it out with {' '.join(foreign)}")
    for key in keys:
        if key not in known:
            reader = f"an argument of {target}" if target else "a key of the configuration"
            _fail(f"{path}{key}", reader, [f"{path}{name}" for name in known])
        if isinstance(cfg[key], DictConfig) and (not target or "_target_" in cfg[key]):
            default = reference.get(key)
            check_keys(cfg[key], default if isinstance(default, DictConfig) else DictConfig({}), f"{path}{key}.")
    if target:
        check_types(cfg, get_object(target), path)


def check_nodes(cfg: DictConfig, reference: DictConfig, path: str = "") -> None:
    """End the program if a value stands where the YAML file has keys, or for a switch something but true or false.

    Args:
        cfg: the configuration, or a node of it without a target.
        reference: what the recipe's own YAML file holds.
        path: dotted path of ``cfg`` within the whole configuration, with a dot at its end.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """
    for key, default in reference.items():
        if isinstance(default, bool):
            _check(cfg, str(key), "true or false", lambda value: isinstance(value, bool), path)
        elif isinstance(default, DictConfig) and key in cfg:
            names = ", ".join(map(str, default)) or "_target_, ..."
            _check(cfg, str(key), f"a node of keys: {names}", lambda value: isinstance(value, DictConfig), path)
            if "_target_" not in cfg[key]:
                check_nodes(cfg[key], default, f"{path}{key}.")


def check_types(cfg: DictConfig, target: Callable[..., object], path: str) -> None:
    """End the program if a value cannot be what a target's annotation says; other annotations say nothing of YAML.

    Args:
        cfg: arguments of the target.
        target: function or class.
        path: dotted path of ``cfg`` within the whole configuration, with a dot at its end.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """
    for name, kind in arguments_of(target).items():
        if name in cfg and not (isinstance(cfg[name], DictConfig) and "_target_" in cfg[name]):
            _check(cfg, name, _kind_in_words(kind), functools.partial(_fits, kind=kind), path)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    if origin in (float, int):
        return _is_number(value) if origin is float else _is_integer(value)
    if not isinstance(origin, type) or origin in (Any, object, inspect.Parameter.empty):
        return True
    if issubclass(origin, bool | str | NoneType):
        return isinstance(value, origin)
    if issubclass(origin, Mapping):
        return isinstance(value, DictConfig)
    if not issubclass(origin, Iterable | torch.Tensor):
        return False  # something that a nested _target_ has to make
    pair = origin is tuple and Ellipsis not in arguments
    kinds = arguments if pair else arguments[:1] * len(value) if isinstance(value, ListConfig) else ()
    return isinstance(value, ListConfig) and (
        not arguments or (len(value) == len(kinds) and all(map(_fits, value, kinds)))
    )


def _kind_in_words(kind: Any) -> str:
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    words = {float: "a number", int: "an integer", bool: "true or false", str: "text", NoneType: "null"}
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_kind_in_words, arguments)))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in words:
        return words[origin]
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}, each {_kind_in_words(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "keys and values"
    if isinstance(origin, type) and (issubclass(origin, Iterable) or origin is torch.Tensor):
        return "a list" + (f", each {_kind_in_words(arguments[0])}" if arguments else "")
    return f"a _target_ that makes a {getattr(kind, '__name__', kind)}"


def _located(target: object, path: str) -> Callable[..., object]:
    try:
        found = get_object(str(target))
        inspect.signature(found)
    except Exception as error:
        raise SystemExit(
            f"{path}_target_ must name a function or a class; got {target}: {_in_one_line(error)}"
        ) from error
    return found


def arguments_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a function or class and their annotations, ``Any`` for those that only type checkers can resolve.

    Those of a ``TypedDict`` (``**options: Unpack[...]``) are among them.
    """
    scope = getattr(target.__init__ if isinstance(target, type) else target, "__globals__", {})
    kinds: dict[str, Any] = {}
    for parameter in inspect.signature(target).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, str):
            try:
                kind = eval(kind, scope)  # the target's own source
            except NameError:
                kind = Any
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            for options in get_args(kind):
                kinds |= get_type_hints(options)
        else:
            kinds[parameter.name] = kind
    return kinds


def check_loss(cfg: DictConfig, networks: tuple[str, ...], folder: Path) -> None:
    """End the program if the loop is not made for the loss, which it might train as something else without an error.

    Args:
        cfg: the configuration.
        networks: see :func:`recipe`.
        folder: of the recipes' YAML files.

    Raises:
        SystemExit: with the choices of ``loss=`` that the loop trains.
    """
    _located(cfg.loss.get("_target_"), "loss.")
    if not _trains(networks, cfg.loss):
        files = {name: _load(folder / "loss", name) for name in sorted(_groups(folder)["loss"])}
        fitting = [name for name, node in files.items() if _trains(networks, node.get("loss", node))]
        raise SystemExit(
            f"{cfg.recipe} does not train {cfg.loss._target_.rpartition('.')[2]}, which needs another loop; it takes "
            f"loss={', '.join(fitting)}. The README's table of methods says which recipe trains which loss."
        )


def _trains(networks: tuple[str, ...], node: DictConfig) -> bool:
    arguments = inspect.signature(get_object(node._target_)).parameters.values()
    needed = tuple(argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD)
    return needed == networks or not isinstance(get_object(node._target_), type)


def check_collector(cfg: DictConfig, collectors: tuple[str, ...], folder: Path) -> None:
    """End the program if the loop cannot use the collector.

    Args:
        cfg: the configuration.
        collectors: see :func:`recipe`.
        folder: of the recipes' YAML files.

    Raises:
        SystemExit: with the choices of ``collector=`` that it can use.
    """
    target = cfg.collector.get("_target_")
    others = [name for name in _groups(folder)["collector"] if name not in collectors]
    if target in [_load(folder / "collector", name)._target_ for name in others]:
        raise SystemExit(
            f"{cfg.recipe} does not collect with {target}; it takes collector={', '.join(sorted(collectors))}."
        )


def check_values(cfg: DictConfig, *, several_seeds: bool, unread: tuple[str, ...]) -> None:
    """End the program if a value of the loop is out of its range, before anything is built.

    Args:
        cfg: the configuration.
        several_seeds: whether the recipe takes a list of seeds.
        unread: see :func:`recipe`.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """

    def is_up_to(highest: float) -> Callable[[Any], bool]:
        return lambda value: _is_integer(value) and 1 <= value <= highest

    def check(key: str, allowed: str, is_allowed: Callable[[Any], object]) -> None:
        if key.partition(".")[0] not in unread:
            _check(cfg, key, allowed, is_allowed)

    loop = ("total_frames", "frames_per_batch", "epochs", "processes", "env.num_envs", "env.max_steps")
    for key in (*loop, "evaluation.interval", "evaluation.episodes"):
        check(key, "an integer of at least 1", is_up_to(2**63 - 1))
    for key in ("env.num_envs", "minibatch_size"):
        size = f"an integer from 1 to frames_per_batch, {cfg.frames_per_batch}"
        check(key, size, is_up_to(cfg.frames_per_batch))
    cores = os.cpu_count() or 1
    check("num_threads", f"an integer from 1 to this machine's processors, {cores}", is_up_to(cores))
    for key in ("gamma", "lmbda"):
        check(key, "between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1)
    check("max_grad_norm", "a number above 0 (inf: no limit)", lambda value: _is_number(value) and value > 0)
    check("chunk_length", "null or an integer of at least 1", lambda value: value is None or is_up_to(2**63 - 1)(value))
    check_chunks(-(-cfg.frames_per_batch // cfg.env.num_envs), None if "chunk_length" in unread else cfg.chunk_length)
    for key in ("method", "environment"):
        check(key, "a name that a folder can have", lambda value: re.fullmatch(r"[\w+-][\w.+-]*", _text(value)))
    check("env.scenario", "a name", _text)
    check("folder", "the path of a folder", _text)
    seeds = list(cfg.seed) if several_seeds and isinstance(cfg.seed, ListConfig) else [cfg.seed]
    more = ", or a list of different ones" if several_seeds else " (lists are for recipes/seeds.py)"
    allowed = f"an integer of at least 0, at most {_LARGEST_SEED}{more}"
    are_seeds = all(_is_integer(seed) and 0 <= seed <= _LARGEST_SEED for seed in seeds)
    check("seed", allowed, lambda _: are_seeds and len(set(seeds)) == len(seeds) > 0)
    check_device(cfg.device)


def check_device(device: str | None) -> None:
    """End the program if Torch cannot use a device here.

    Raises:
        SystemExit: with what can be used.
    """
    if not _is_text_or_null(device):
        raise SystemExit(f"device must be null or the name of one of Torch's; got {device}.")
    try:
        available = torch.device(device or "cpu").type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise SystemExit(f"device={device} is none of Torch's: {str(error).splitlines()[0]}") from None
    if not available:
        raise SystemExit(f"device={device} needs CUDA, which Torch does not find here; device=cpu runs anywhere.")


def _check(cfg: DictConfig, key: str, allowed: str, is_allowed: Callable[[Any], object], path: str = "") -> None:
    if not is_allowed(value := OmegaConf.select(cfg, key)):
        hint = (
            f" Write {value:.0f}." if isinstance(value, float) and value.is_integer() and is_allowed(int(value)) else ""
        )
        raise SystemExit(f"{path}{key} must be {allowed}; got {'null' if value is None else value}.{hint}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> TypeGuard[float]:
    return _is_integer(value) or (isinstance(value, float) and value == value)


def _text(value: object) -> str:
    """The value if it is text; else nothing."""
    return value if isinstance(value, str) else ""


def _is_text_or_null(value: object) -> bool:
    return value is None or _text(value) != ""


def _checked_override(argument: str, folder: Path, name: str, unread: tuple[str, ...] = ()) -> str:
    """Check the root of an override by name; let a new key below it through to ``check_keys``."""
    if argument.startswith("hydra/launcher=submitit") and find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise SystemExit(f'{argument} needs the launcher: pip install "torchrl_marl[scale]"')
    if (removed := re.fullmatch(r"~([A-Za-z_]\w*)(=.*)?", argument)) and removed[1] in {
        *_groups(folder),
        *_load(folder, name),
    }:
        raise SystemExit(f"{argument}: {name} needs {removed[1]}; it can be changed ({removed[1]}=...), not left out.")
    match = re.fullmatch(r"(\+{0,2})([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", argument, flags=re.DOTALL)
    if match is None or match[2] == "hydra":
        return argument
    plus, root, below, value = match.groups()
    groups = _groups(folder)
    if root not in groups and root not in _load(folder, name):
        _fail(root + below, "a key of the configuration", [*groups, *map(str, _load(folder, name))])
    if root in unread:
        raise SystemExit(f"{argument} has no effect: {name} has no use for {root}; leave it out.")
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
    hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
    raise SystemExit(f"{key} is not {what}{hint}.")
