"""Checks of a command line: unknown keys, and values out of range or of another type, end the program with one line."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, Union, get_args, get_origin

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from typing_extensions import get_type_hints

from torchrl_marl.run.names import check_known
from torchrl_marl.signatures import signature

__all__ = ["check_device", "check_keys", "check_types", "check_values"]

_LARGEST_SEED = 2**32 - 1 - 3_000_009  # evaluation seeds add up to 3_000_009, and NumPy takes 32 bits
_PASSED = ("device", "group", "seed")  # by recipes, to what they instantiate
_Test = Callable[[Any], object]


def check(cfg: DictConfig, key: str, allowed: str, is_allowed: _Test, path: str = "") -> None:
    """End the program with the key, the value and the allowed values, unless the value is allowed."""
    if not is_allowed(value := OmegaConf.select(cfg, key)):
        hint = (
            f" Write {value:.0f}." if isinstance(value, float) and value.is_integer() and is_allowed(int(value)) else ""
        )
        raise SystemExit(f"{path}{key} must be {allowed}; got {'null' if value is None else value}.{hint}")


def in_one_line(error: Exception) -> str:
    """The text of an error without Hydra's search path."""
    return " ".join(str(error).partition("\nConfig search path")[0].split()).replace("'++", "'")  # which nobody typed


def check_choices(cfg: DictConfig, overrides: Iterable[str], groups: Mapping[str, Iterable[str]], folder: Path) -> None:
    """End the program if a group's choice has no effect because other choices override it.

    Raises:
        SystemExit: with the choice and the overriding value, or with a key of an object that is not built.
    """
    words = (override.lstrip("+").partition("=") for override in overrides)
    chosen = {key: value for key, _, value in words}
    for group, choices in groups.items():
        node = cfg.get(group)
        if isinstance(node, DictConfig) and node and "_target_" not in node:
            raise SystemExit(f"{group}.{next(iter(node))} has no effect: with these choices no {group} is built.")
        if chosen.get(group, "") not in choices or f"{group}._target_" in chosen:
            continue
        file = OmegaConf.load(folder / group / f"{chosen[group]}.yaml")
        target = OmegaConf.select(file, f"{group}._target_") or OmegaConf.select(file, "_target_")
        if target not in (None, found := OmegaConf.select(cfg, f"{group}._target_")):
            raise SystemExit(f"{group}={chosen[group]} has no effect: other choices set {group} to {found or 'null'}.")


def check_keys(cfg: DictConfig, reference: DictConfig, path: str = "") -> None:
    """End the program if the configuration holds an unknown key or a value of another type than its target takes.

    Args:
        cfg: the configuration; keys of a node with a ``_target_`` must be arguments of the target.
        reference: content of the recipe's YAML file; keys of other nodes must occur there.
        path: dotted path of ``cfg`` within the whole configuration.

    Raises:
        SystemExit: with the key and the nearest names, or with the overrides that remove the YAML file's keys for
            another target.
    """
    check_known(cfg, reference, lambda target, path: arguments_of(_located(target, path)), path)
    _check_all_types(cfg, path)


def _check_all_types(cfg: DictConfig, path: str) -> None:
    """:func:`check_types` of all that the keys name, as :func:`check_known` goes through them."""
    target = cfg.get("_target_")
    for key in cfg:
        if isinstance(cfg[key], DictConfig) and (not target or "_target_" in cfg[key]):
            _check_all_types(cfg[key], f"{path}{key}.")
    if target:
        check_types(cfg, get_object(target), path)


def check_nodes(cfg: DictConfig, reference: DictConfig, path: str = "") -> None:
    """End the program if a value replaces a node of keys, or a switch is not true or false.

    Args:
        cfg: the configuration, or a node without a target.
        reference: content of the recipe's YAML file.
        path: dotted path of ``cfg`` within the whole configuration, with a dot at its end.

    Raises:
        SystemExit: with the key, the value and the allowed values.
    """
    for key, default in reference.items():
        if isinstance(default, bool):
            check(cfg, str(key), *_YAML[bool], path)
        elif isinstance(default, DictConfig) and key in cfg:
            names = ", ".join(map(str, default)) or "_target_, ..."
            check(cfg, str(key), f"a node of keys: {names}", lambda value: isinstance(value, DictConfig), path)
            if "_target_" not in cfg[key]:
                check_nodes(cfg[key], default, f"{path}{key}.")


def check_types(cfg: DictConfig, target: Callable[..., object], path: str) -> None:
    """End the program if a value does not match the annotation of a target; unsupported annotations are not checked.

    Args:
        cfg: arguments of the target.
        target: function or class.
        path: dotted path of ``cfg`` within the whole configuration, with a dot at its end.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """
    for name, kind in arguments_of(target).items():
        if name in cfg and not (isinstance(cfg[name], DictConfig) and "_target_" in cfg[name]):
            check(cfg, name, *_in_yaml(kind), path)


def _in_yaml(kind: Any) -> tuple[str, _Test]:
    """Return the YAML form of a type in words, and as a test."""
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if origin in _YAML:
        return _YAML[origin]
    if origin in (Union, UnionType):
        words, tests = zip(*map(_in_yaml, arguments), strict=True)
        return " or ".join(dict.fromkeys(words)), lambda value: any(test(value) for test in tests)
    if origin is Literal:
        allowed = [(type(value), value) for value in arguments]
        return " or ".join(map(str, arguments)), lambda value: (type(value), value) in allowed
    if not isinstance(origin, type) or origin in (Any, object, inspect.Parameter.empty):
        return "anything", lambda _: True
    if issubclass(origin, Mapping):
        return "keys and values", lambda value: isinstance(value, DictConfig)
    if not issubclass(origin, Iterable | torch.Tensor):
        return f"a _target_ that makes a {getattr(kind, '__name__', kind)}", lambda _: False
    length = len(arguments) if origin is tuple and Ellipsis not in arguments else None
    word, test = _in_yaml(arguments[0]) if arguments else ("anything", lambda _: True)
    return (
        "a list" + (f" of {length}" if length else "") + (f", each {word}" if arguments else ""),
        lambda value: isinstance(value, ListConfig) and length in (None, len(value)) and all(map(test, value)),
    )


def _located(target: object, path: str) -> Callable[..., object]:
    try:
        if importlib.util.find_spec(str(target).partition(".")[0]) is None:
            sys.path.append(str(Path.cwd()))  # modules of the current folder, as env.factory finds them
        found = get_object(str(target))
        signature(found)
    except Exception as error:
        raise SystemExit(
            f"{path}_target_ must name a function or a class; got {target}: {in_one_line(error)}"
        ) from error
    return found


def arguments_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a function or class with annotations, ``Any`` for those that only type checkers can resolve.

    Arguments of a ``TypedDict`` (``**options: Unpack[...]``) are included.
    """
    scope = getattr(target.__init__ if isinstance(target, type) else target, "__globals__", {})
    kinds: dict[str, Any] = {}
    for parameter in signature(target).parameters.values():
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


def with_defaults(value: Any) -> Any:
    """A value of a configuration with what the classes in it take beyond what it says, where YAML can say that."""
    if not isinstance(value, DictConfig):
        return value
    shown = {str(key): with_defaults(child) for key, child in value.items()}
    if "_target_" in value:
        target = _located(value._target_, "")
        scopes = (
            [target.__init__, *(base.__init__ for base in target.__mro__)] if isinstance(target, type) else [target]
        )
        for name in arguments_of(target):
            signatures = (signature(scope).parameters for scope in scopes)
            default = next((own[name].default for own in signatures if name in own), inspect.Parameter.empty)
            if isinstance(default, (*_YAML, tuple)) and name not in _PASSED:
                shown.setdefault(name, list(default) if isinstance(default, tuple) else default)
    return shown


def check_loss(cfg: DictConfig, networks: tuple[str, ...], folder: Path) -> None:
    """End the program if the loop does not support the loss, which it might silently train incorrectly.

    Args:
        cfg: the configuration.
        networks: networks that the loop builds.
        folder: folder of the recipes' YAML files.

    Raises:
        SystemExit: with the choices of ``loss=`` that the loop supports.
    """
    _located(cfg.loss.get("_target_"), "loss.")
    if not trains(networks, cfg.loss):
        files = {path.stem: DictConfig(OmegaConf.load(path)) for path in sorted((folder / "loss").glob("*.yaml"))}
        fitting = [name for name, node in files.items() if trains(networks, node.get("loss", node))]
        raise SystemExit(
            f"{cfg.recipe} does not train {cfg.loss._target_.rpartition('.')[2]}, which needs another loop; it takes "
            f"loss={', '.join(fitting)}. The README's table of methods says which recipe trains which loss."
        )


def trains(networks: tuple[str, ...], node: DictConfig) -> bool:
    arguments = signature(get_object(node._target_)).parameters.values()
    needed = tuple(argument.name for argument in arguments if argument.kind is argument.POSITIONAL_OR_KEYWORD)
    return needed == networks or not isinstance(get_object(node._target_), type)


def check_values(cfg: DictConfig, unread: tuple[str, ...]) -> None:
    """End the program if a value of the loop is out of its range, before any object is built.

    Args:
        cfg: the configuration.
        unread: keys that the loop does not use.

    Raises:
        SystemExit: with the key, the value and what is allowed.
    """

    def is_up_to(highest: float) -> _Test:
        return lambda value: _is_integer(value) and 1 <= value <= highest

    cores, frames = os.cpu_count() or 1, cfg.frames_per_batch
    count = "an integer of at least 1", is_up_to(2**63 - 1)
    count_or_null = "null or an integer of at least 1", lambda value: value is None or count[1](value)
    share = f"an integer from 1 to frames_per_batch, {frames}", is_up_to(frames)
    fraction = "between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1
    name = "a name that a folder can have", lambda value: re.fullmatch(r"[\w+-][\w.+-]*", _text(value))
    highest = f"an integer of at least 0, at most {_LARGEST_SEED} (several, one after the other: -m seed=0,1)"
    ranges: list[tuple[str, str, _Test]] = [
        *((key, *count) for key in ("total_frames", "frames_per_batch", "epochs", "processes", "env.num_envs")),
        *((key, *count) for key in ("env.max_steps", "evaluation.episodes")),
        *((key, *count_or_null) for key in ("evaluation.interval", "chunk_length")),
        *((key, *share) for key in ("env.num_envs", "minibatch_size")),
        ("num_threads", f"an integer from 1 to this machine's processors, {cores}", is_up_to(cores)),
        *((key, *fraction) for key in ("gamma", "lmbda")),
        ("max_grad_norm", "a number above 0 (inf: no limit)", lambda value: _is_number(value) and value > 0),
        (
            "critic_lr",
            "null or a number of at least 0",
            lambda value: value is None or (_is_number(value) and value >= 0),
        ),
        *((key, *name) for key in ("method", "environment")),
        ("seed", highest, lambda value: _is_integer(value) and 0 <= value <= _LARGEST_SEED),
        ("env.scenario", "a name", _text),
        ("folder", "the path of a folder", _text),
        ("init_from", "null, a checkpoint or the folder of a run", is_text_or_null),
        ("compile", "auto, true or false", lambda value: value == "auto" or isinstance(value, bool)),
    ]
    for key, allowed, is_allowed in ranges:
        if key.partition(".")[0] not in unread:
            check(cfg, key, allowed, is_allowed)
    check_device(cfg.device)


def check_device(device: str | None) -> None:
    """End the program if Torch cannot use a device on this machine.

    Raises:
        SystemExit: with the usable devices.
    """
    if not is_text_or_null(device):
        raise SystemExit(f"device must be null or the name of a torch device; got {device}.")
    try:
        available = torch.device(device or "cpu").type != "cuda" or torch.cuda.is_available()
    except RuntimeError as error:
        raise SystemExit(f"device={device} is not a valid torch device: {str(error).splitlines()[0]}") from None
    if not available:
        raise SystemExit(f"device={device} needs CUDA, which Torch does not find here; device=cpu runs anywhere.")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: object) -> TypeGuard[float]:
    return _is_integer(value) or (isinstance(value, float) and value == value)


def _text(value: object) -> str:
    """The value if it is text, else an empty string."""
    return value if isinstance(value, str) else ""


def is_text_or_null(value: object) -> bool:
    """Whether a value is null or non-empty text."""
    return value is None or _text(value) != ""


_YAML: dict[Any, tuple[str, _Test]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer", _is_integer),
    float: ("a number", _is_number),
    str: ("text", lambda value: isinstance(value, str)),
    NoneType: ("null", lambda value: value is None),
}
