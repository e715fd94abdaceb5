"""Checkpoints of a run: single files, written atomically, loaded without executing pickled code."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointRotation,
    JSONCheckpointAdapter,
    StateDictCheckpointAdapter,
)

from torchrl_marl.modules import (
    GroupSpec,
    make_actor,
    make_cnn_actor,
    make_ldsa_actor,
    make_mat,
    make_recurrent_actor,
    make_sable,
)
from torchrl_marl.shelf import zoo_policy
from torchrl_marl.trust import reason

__all__ = [
    "FORMAT_VERSION",
    "CheckpointFolder",
    "best_checkpoint",
    "check_resumable",
    "find_checkpoint",
    "load_policy",
    "read_metadata",
]

FORMAT_VERSION = 1
"""Version of the checkpoint format, increased whenever policies of older files can no longer be read."""

_BUILDERS: dict[str, Callable[..., Any]] = {
    f"torchrl_marl.modules.{build.__name__}": build
    for build in (make_actor, make_cnn_actor, make_ldsa_actor, make_mat, make_recurrent_actor, make_sable)
}

_SCORE = "score"
_NAME = re.compile(r"checkpoint-(\d+)(\.torchrl)?")


class CheckpointFolder:
    """The checkpoints of one run: the two newest and the best.

    Files are written atomically: a file is complete under its final name or does not exist. Tensors are stored by
    ``torch.save`` and read with ``weights_only=True``; everything else is JSON.

    Args:
        folder: folder of the files, created with the first checkpoint.
        **components: saved and restored components by name: objects with a ``state_dict``, or JSON dictionaries.
    """

    def __init__(self, folder: Path, **components: Any) -> None:
        self._rotation = CheckpointRotation(folder, keep_last=2, keep_best=(_SCORE, "max"))
        self._checkpoint = _bind(components)

    def save(self, *, frames: int, score: float, metadata: Mapping[str, Any]) -> Path:
        """Write the state after ``frames`` frames with its score; delete checkpoints that are neither new nor best."""
        metadata = {"version": FORMAT_VERSION, _SCORE: score, **metadata}
        return self._rotation.save(self._checkpoint, step=frames, metadata=metadata)

    def load(self, path: Path) -> None:
        """Restore every component in place.

        Raises:
            ValueError: if the file is damaged, foreign or of another version (components are then unchanged), or has
                other components.
        """
        _load(self._checkpoint, path)

    def set_aside_beyond(self, frames: int) -> None:
        """Move checkpoints of more than ``frames`` frames, and damaged ones, to ``abandoned/``."""
        found, damaged = _survey(self._rotation.directory)
        for path in [*damaged, *(path for path, metadata in found.items() if metadata["frames"] > frames)]:
            target = path.parents[1] / "abandoned" / path.name
            target.parent.mkdir(exist_ok=True)
            path.replace(target)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint, or ``None``."""
        found, _ = _survey(self._rotation.directory)
        return _newest(found) if found else None

    @property
    def best(self) -> tuple[Path, float]:
        """The stored checkpoint with the highest score, and the score."""
        found, _ = _survey(self._rotation.directory)
        path = _best(found)
        return path, found[path][_SCORE]


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or the newest checkpoint in a run's folder.

    A warning names damaged checkpoints.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if all checkpoints are damaged.
    """
    return _choose(path, _newest)


def best_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or the checkpoint with the highest score in a run's folder.

    A warning names damaged checkpoints.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if all checkpoints are damaged.
    """
    return _choose(path, _best)


def check_resumable(checkpoint: Path) -> None:
    """Reject resuming a run whose files would be written elsewhere, or cannot be written.

    Raises:
        ValueError: if the checkpoint or a file in the run's folder is a link out of the folder, or the folder is
            read-only or full.
    """
    if checkpoint.is_symlink() or checkpoint.parent.is_symlink():
        raise ValueError(
            f"{checkpoint} is a link or lies behind one, and the run would be written to where it leads: name that, or "
            "copy it."
        )
    run = checkpoint.resolve().parents[1]
    if checkpoint.resolve().parent.name != "checkpoints":
        return  # Run rejects a checkpoint outside a run's folder
    for folder, folders, files in os.walk(run):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not path.resolve().is_relative_to(run):
                raise ValueError(f"{path} is a link out of the run's folder, and would be written through: remove it.")
        if Path(folder) == run:  # W&B links to its caches, and writes to new folders only
            folders[:] = [name for name in folders if name not in ("wandb", "abandoned")]
    try:
        tempfile.TemporaryFile(dir=run).close()
    except OSError as error:
        raise ValueError(f"{run} cannot be written to: {reason(error)}. Copy it to where there is room.") from error


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint (``config``, ``frames``, ``score``, ...) without loading tensors.

    Raises:
        ValueError: if ``path`` is not a file, or the file is damaged, foreign or of another version.
    """
    metadata = _read_manifest(path)["metadata"]
    if isinstance(env := metadata["config"].get("env"), dict):
        env.pop("compile", None)  # key of older releases, replaced by compile=
    return metadata


def load_policy(
    path: str | Path,
    *,
    actor: TensorDictModuleBase | None = None,
    build: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
) -> TensorDictModuleBase:
    """Load the policy of a run.

    The policy needs no environment and no critic. It acts on local observations only; policies of
    :func:`~torchrl_marl.modules.make_mat` and :func:`~torchrl_marl.modules.make_sable` act on those of the whole group.

    Args:
        path: a checkpoint file, a run's folder (uses its best checkpoint), or ``"zoo:TASK/METHOD"``, a policy that is
            part of the package (``torchrl-marl zoo`` lists them).
        actor: actor to load the parameters into; only needed for a custom actor.
        build: builder of a custom actor, called as ``build(shape, **options, device=device)`` with a
            :class:`~torchrl_marl.modules.GroupSpec` and the run's options, as in its recipe.
        device: device of the policy; ``None`` keeps the device of ``actor``, or uses the CPU.

    Returns:
        Actor that reads ``(group, "observation")`` and writes ``(group, "action")``. Actions are deterministic, except
        under ``torchrl.envs.set_exploration_type(ExplorationType.RANDOM)``. A recurrent actor also reads
        ``(group, "recurrent_state")``, zeros at the start of an episode, and writes the next state under
        ``("next", group, "recurrent_state")``; :func:`torchrl_marl.modules.with_recurrent_state` handles these states
        and Sable's memory. For several groups, the actors run in sequence; ``policy[i]`` is the actor of group i.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the checkpoint is damaged, foreign or of another version, or ``actor`` is missing or does not
            match.
    """
    path = best_checkpoint(path)
    if actor is None:
        recorded = read_metadata(path)["actor"]
        if isinstance(recorded, dict):
            actor = _rebuild(recorded, path, build, device)
        else:
            actor = TensorDictSequential([_rebuild(record, path, build, device) for record in recorded])
    _load(_bind({"actor": actor}), path)
    if device is not None:
        actor.to(device)
    return actor


def actor_record(shape: GroupSpec | Sequence[GroupSpec], config: Mapping[str, Any]) -> Any:
    """Record that :func:`load_policy` rebuilds the actor of ``config``, with its ``_target_``, from.

    For the actors of several groups, the record is a list.
    """
    if not isinstance(shape, GroupSpec):
        return [actor_record(own, config) for own in shape]
    options = {key: value for key, value in config.items() if key != "_target_"}
    return {"builder": config["_target_"], "shape": dataclasses.asdict(shape), "options": options}


def _rebuild(
    recorded: Mapping[str, Any], path: Path, build: Callable[..., Any] | None, device: torch.device | str | None
) -> TensorDictModuleBase:
    name = recorded["builder"]
    build = build or _BUILDERS.get(name)
    if build is None:  # importing a name from a file would execute untrusted code
        raise ValueError(
            f"The actor of {path} was built by {name}: if you trust it, say --actor {':'.join(name.rsplit('.', 1))}, "
            "or in Python build it and pass it as actor=."
        )
    options = {key: value for key, value in recorded["options"].items() if key != "value_norm"}  # the critic's
    try:
        built = build(GroupSpec(**recorded["shape"]), **options, device=device)
        return built[0] if isinstance(built, tuple) else built  # without the critic
    except Exception as error:  # sizes and options are unchecked
        raise ValueError(f"{path} describes an actor that cannot be built: {reason(error)}") from error


def _bind(components: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint(format="archive")
    for name, component in components.items():
        plain = isinstance(component, dict)
        adapter = JSONCheckpointAdapter() if plain else StateDictCheckpointAdapter(payload_format="torch")
        checkpoint.register(name, component, adapter=adapter)
    return checkpoint


def _choose(path: str | Path, choose: Callable[[Mapping[Path, Mapping[str, Any]]], Path]) -> Path:
    zoo, _, name = str(path).partition("zoo:")
    path = zoo_policy(name) if name and not zoo else Path(path).expanduser()
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        found, damaged = _survey(folder)
        if found:
            chosen = choose(found)
            for error in damaged.values():
                warnings.warn(f"{error} Passed over, {chosen} is used.", stacklevel=3)
            return chosen
        if damaged:
            raise ValueError(" ".join(damaged.values()))
    raise FileNotFoundError(f"No checkpoint at {path}: name a checkpoint file or the folder of a run with checkpoints.")


def _survey(folder: Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Metadata of the checkpoints in a folder, oldest first, and errors of unreadable checkpoints.

    ``CheckpointRotation`` skips unreadable checkpoints silently, and takes folders for checkpoints.
    """
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()] if folder.is_dir() else []
    found, damaged = {}, {}
    for _, path in sorted((int(match[1]), path) for match, path in matches if match):
        try:
            found[path] = read_metadata(path)
        except ValueError as error:
            damaged[path] = str(error)
    return found, damaged


def _newest(found: Mapping[Path, Mapping[str, Any]]) -> Path:
    return list(found)[-1]


def _best(found: Mapping[Path, Mapping[str, Any]]) -> Path:
    return max(found, key=lambda path: (found[path][_SCORE], found[path]["frames"]))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after a check of its form; its values are untrusted."""
    if not path.is_file():  # TorchRL would read a folder as TensorDicts, which execute pickles
        raise ValueError(f"{path} is no file; a checkpoint of torchrl_marl is one, an archive.")
    try:
        manifest = Checkpoint.manifest(path)
        version = manifest["metadata"].get("version")
        if version == FORMAT_VERSION:
            _check_form(manifest["metadata"])
    except Exception as error:  # damaged archives raise any exception, from NotImplementedError to UnicodeDecodeError
        raise ValueError(f"{path} is not a complete checkpoint of torchrl_marl: {reason(error)}.") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has version {version}; this release reads {FORMAT_VERSION}.")
    return manifest


def _check_form(metadata: Mapping[str, Any]) -> None:
    score, frames, actor = metadata[_SCORE], metadata["frames"], metadata["actor"]
    if type(score) not in (int, float) or not math.isfinite(score):
        raise ValueError(f"score is {score!r}, not a finite number")
    if type(frames) is not int or not isinstance(metadata["config"], dict):
        raise ValueError("frames is not an integer, or config not a mapping")
    for record in actor if isinstance(actor, list) else [actor]:
        if not isinstance(record["builder"], str) or not isinstance(record["options"], dict):
            raise ValueError("actor does not say how it was built")
        GroupSpec(**record["shape"])


def _load(checkpoint: Checkpoint, path: Path) -> None:
    records = _read_manifest(path)["components"]
    files = {"torchrl.state_dict": ["state.pt"], "torchrl.json": ["value.json"]}
    try:
        for name, record in records.items():
            # TorchRL also reads TensorDict payloads, which may hold pickles; checkpoints here never contain one.
            if record["files"] != files.get(record["adapter"]) or not re.fullmatch(
                r"components/[^/\\]+", record["path"]
            ):
                raise ValueError(f"component {name!r} holds unexpected files {record['files']}")
        checkpoint.load(path, map_location="cpu")
    except Exception as error:  # as above
        pickled = isinstance(error.__cause__, pickle.UnpicklingError)  # its text explains how to execute the pickle
        why = "it holds more than tensors, which is not unpickled" if pickled else reason(error)
        raise ValueError(f"{path} cannot be loaded: {why}") from error
