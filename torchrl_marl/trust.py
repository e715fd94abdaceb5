"""What the files of a run may say: code that this library's configuration groups name, and what is wrong in a line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["foreign_code", "reason"]

# The keys of nodes, and what their _target_ may be there. Recipes' YAML files are no part of an installed package; a
# test compares them. The names are public ones that build something and take no name of further code.
_TARGETS = {
    r"env|collector\.make_env\.config": r"torchrl_marl\.envs\.make_\w+",
    r"actor|critic|guider": r"torchrl_marl\.modules\.make_\w+",
    r"(actor|critic|guider)\.value_norm": r"torchrl\.modules\.PopArtValueNorm",
    r"loss": r"torchrl_marl\.objectives\.\w+Loss",
    r"loss\.target_ratios": r"torchrl_marl\.objectives\.mars\.\w+_target_ratios",
    r"loss\.adapt_ratio": r"torchrl_marl\.objectives\.magpo\.follow_imitation_gap",
    r"optimizer": r"torch\.optim\.[A-Z]\w+",
    r"collector": r"torchrl\.collectors\.Collector|torchrl_marl\.collectors\.\w*[cC]ollector",
    r"collector\.make_env": r"hydra\.utils\.instantiate",
    r"exploration": r"torchrl\.modules\.EGreedyModule",
    r"buffer": r"torchrl_marl\.collectors\.ChunkReplayBuffer",
    r"target_updater": r"torchrl\.objectives\.(Soft|Hard)Update",
    r"encode|cluster": r"torchrl_marl\.modules\.(encode|cluster)_agents",
}

# Arguments that name code, or a machine that sends some, and what they may be without being said again.
_ARGUMENTS = {
    r"(env|collector\.make_env\.config)\.factory(\..*)?": r"",
    r"(env|collector\.make_env\.config)\.package(\..*)?": r"mpe2|pettingzoo(\.\w+)*",
    r"collector\.make_env\.(?!config\.|_target_$|_partial_$|_recursive_$).*": r"",  # arguments for the environment
    r"collector\.address(\..*)?": r"auto|local",
    r"collector\.resources\.(?!num_cpus$|num_gpus$|memory$).*": r"",  # Ray installs and starts what runtime_env says
    r"(.*\.)?_args_(\..*)?": r"",
}

_DEPTH = 20


def foreign_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a stored configuration names code that this library's configuration groups do not name.

    Args:
        config: nested dictionaries and lists, as they are stored: nothing in them is resolved or imported here.

    Returns:
        Values by dotted key: foreign ``_target_`` at any depth, positional arguments, ``env.factory`` and its kin.
        The environment's copy that a collector of workers holds is left out if it is one.

    Raises:
        ValueError: if a value is an OmegaConf interpolation, which would be resolved when it is read, or missing, or
            the nesting is endless.

    Example:
        >>> foreign_code({"env": {"_target_": "torchrl_marl.envs.make_custom", "factory": "os:system", "num_envs": 4}})
        {'env.factory': 'os:system'}
    """
    return {key: value for key, value in _leaves(config, config.get("env")) if not _is_ours(key, value)}


def reason(error: Exception) -> str:
    """One line of an error, whose text may have many or none.

    Example:
        >>> reason(KeyError("seed")), reason(ValueError("two   words")), reason(AssertionError())
        ("KeyError: 'seed'", 'two words', 'AssertionError')
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _leaves(node: Any, env: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if key.count(".") > _DEPTH:
        raise ValueError(f"{key} lies too deep")
    if isinstance(node, dict | list) and node and key.rpartition(".")[2] != "_target_":
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            path = f"{key}.{name}" if key else str(name)
            if "${" in path:
                raise ValueError(f"{path} is an interpolation, which is not resolved")
            if path != "collector.make_env.config" or child != env:
                yield from _leaves(child, env, path)
    elif isinstance(node, str) and ("${" in node or node == "???"):
        raise ValueError(f"{key} is {node!r}, an interpolation, which is not resolved")
    else:
        yield key, node


def _is_ours(key: str, value: Any) -> bool:
    place, _, name = key.rpartition(".")
    if name == "_target_":
        return any(re.fullmatch(there, place) and re.fullmatch(ours, str(value)) for there, ours in _TARGETS.items())
    ours = [ours for there, ours in _ARGUMENTS.items() if re.fullmatch(there, key)]
    return value is None or all(re.fullmatch(pattern, str(value)) for pattern in ours)
