"""Checks of untrusted run files: foreign code in a configuration, and errors as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["foreign_code", "reason"]

# Keys of nodes and their allowed _target_. The recipes' YAML files are not part of an installed package; a test
# compares both. All names are public builders that take no names of further code as arguments.
_TARGETS = {
    r"env|collector\.make_env\.config": r"torchrl_marl\.envs\.make_\w+",
    r"actor|critic|guider": r"torchrl_marl\.modules\.make_\w+",
    r"(actor|critic|guider)\.value_norm": r"torchrl\.modules\.PopArtValueNorm",
    r"loss": r"torchrl_marl\.objectives\.\w+Loss",
    r"loss\.target_ratios": r"torchrl_marl\.objectives\.mars\.\w+_target_ratios",
    r"loss\.adapt_ratio": r"torchrl_marl\.objectives\.magpo\.follow_imitation_gap",
    r"loss\.gate": r"torchrl_marl\.objectives\.reuse\.fading_reuse_matrix",
    r"optimizer": r"torch\.optim\.[A-Z]\w+",
    r"scheduler": r"torch\.optim\.lr_scheduler\.\w+LR",
    r"collector": r"torchrl\.collectors\.Collector|torchrl_marl\.collectors\.\w*[cC]ollector",
    r"collector\.make_env": r"hydra\.utils\.instantiate",
    r"exploration": r"torchrl\.modules\.EGreedyModule",
    r"buffer": r"torchrl_marl\.collectors\.ChunkReplayBuffer",
    r"target_updater": r"torchrl\.objectives\.(Soft|Hard)Update",
    r"encode|cluster": r"torchrl_marl\.modules\.(encode|cluster)_agents",
}

# Arguments that name code, or a machine that sends code, and the values allowed without confirmation.
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
    """Return the entries of a stored configuration that name code unknown to this library's configuration groups.

    Args:
        config: nested dictionaries and lists as stored; nothing is resolved or imported here.

    Returns:
        Values by dotted key: foreign ``_target_`` at any depth, positional arguments, ``env.factory`` and similar. The
        copy of the environment's configuration in a collector of workers is left out if it equals the environment's.

    Raises:
        ValueError: if a value is missing or an OmegaConf interpolation, which would be resolved on access, or the
            nesting is too deep.

    Example:
        >>> foreign_code({"env": {"_target_": "torchrl_marl.envs.make_custom", "factory": "os:system", "num_envs": 4}})
        {'env.factory': 'os:system'}
    """
    return {key: value for key, value in _leaves(config, config.get("env")) if not _is_ours(key, value)}


def reason(error: Exception) -> str:
    """The text of an error as one line, also if the text is empty or has several lines.

    Example:
        >>> reason(KeyError("seed")), reason(ValueError("two   words")), reason(AssertionError())
        ("KeyError: 'seed'", 'two words', 'AssertionError')
    """
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text or type(error).__name__


def _leaves(node: Any, env: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if key.count(".") > _DEPTH:
        raise ValueError(f"{key} is nested too deeply")
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
