"""Checkpoints of a run: one file each, written atomically, loaded without executing pickled code."""

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
"""Version of what a checkpoint holds; it grows whenever a policy could no longer be read from an older file."""

_BUILDERS: dict[str, Callable[..., Any]] = {
    f"torchrl_marl.modules.{build.__name__}": build
    for build in (make_actor, make_cnn_actor, make_ldsa_actor, make_mat, make_recurrent_actor, make_sable)
}

_SCORE = "score"
_NAME = re.compile(r"checkpoint-(\d+)(\.torchrl)?")


class CheckpointFolder:
    """The checkpoints of one run: the two newest and the best.

    Every file is complete under its final name or does not exist: it is written beside and renamed. Tensors are stored
    by ``torch.save`` and read with ``weights_only=True``; everything else is JSON.

    Args:
        folder: where the files go; made for the first one.
        **components: what is saved and restored, by name: objects with a ``state_dict``, or JSON dictionaries.
    """

    def __init__(self, folder: Path, **components: Any) -> None:
        self._rotation = CheckpointRotation(folder, keep_last=2, keep_best=(_SCORE, "max"))
        self._checkpoint = _bind(components)

    def save(self, *, frames: int, score: float, metadata: Mapping[str, Any]) -> Path:
        """Write the state after ``frames`` frames, which scored ``score``; drop what is neither new nor best."""
        metadata = {"version": FORMAT_VERSION, _SCORE: score, **metadata}
        return self._rotation.save(self._checkpoint, step=frames, metadata=metadata)

    def load(self, path: Path) -> None:
        """Restore every component in place.

        Raises:
            ValueError: if the file is damaged, foreign, of another version (nothing has been changed then) or of other
                components.
        """
        _load(self._checkpoint, path)

    def set_aside_beyond(self, frames: int) -> None:
        """Move checkpoints of more than ``frames`` frames, and damaged ones, to ``abandoned/``: the run goes on."""
        found, damaged = _survey(self._rotation.directory)
        for path in [*damaged, *(path for path, metadata in found.items() if metadata["frames"] > frames)]:
            target = path.parents[1] / "abandoned" / path.name
            target.parent.mkdir(exist_ok=True)
            path.replace(target)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint, if any."""
        found, _ = _survey(self._rotation.directory)
        return _newest(found) if found else None

    @property
    def best(self) -> tuple[Path, float]:
        """The checkpoint of the highest score, and that score; of those that are there, as are its parameters."""
        found, _ = _survey(self._rotation.directory)
        path = _best(found)
        return path, found[path][_SCORE]


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or the newest one of a run's folder.

    A warning names damaged ones beside it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if all are damaged.
    """
    return _choose(path, _newest)


def best_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or that of a run's folder with the highest score.

    A warning names damaged ones beside it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if all are damaged.
    """
    return _choose(path, _best)


def check_resumable(checkpoint: Path) -> None:
    """Refuse to go on with a run whose files would be written elsewhere, or cannot be written.

    Raises:
        ValueError: if the checkpoint or something in the run's folder is a link that leads out of it, or the folder is
            read-only or full.
    """
    if checkpoint.is_symlink() or checkpoint.parent.is_symlink():
        raise ValueError(
            f"{checkpoint} is a link or lies behind one, and the run would be written to where it leads: name that, or "
            "copy it."
        )
    run = checkpoint.resolve().parents[1]
    if checkpoint.resolve().parent.name != "checkpoints":
        return  # not in a run's folder, which Run refuses
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
    """Return what a checkpoint says of itself (``config``, ``frames``, ``score``, ...) without loading tensors.

    Raises:
        ValueError: if the file is damaged, foreign, of another version or no file.
    """
    metadata = _read_manifest(path)["metadata"]
    if isinstance(env := metadata["config"].get("env"), dict):
        env.pop("compile", None)  # of before compile= alone decided it
    return metadata


def load_policy(
    path: str | Path,
    *,
    actor: TensorDictModuleBase | None = None,
    build: Callable[..., Any] | None = None,
    device: torch.device | str | None = None,
) -> TensorDictModuleBase:
    """Load the policy of a run.

    It needs no environment and no critic: it acts from local observations alone, or, if it is one of
    :func:`~torchrl_marl.modules.make_mat` or :func:`~torchrl_marl.modules.make_sable`, from those of the whole group.

    Args:
        path: a checkpoint file, or a run's folder (then its best checkpoint).
        actor: takes the parameters; needed only if the run built its actor with none of this library's builders.
        build: builds such an actor, ``build(shape, **options, device=device)`` of a
            :class:`~torchrl_marl.modules.GroupSpec` and the run's options, as its recipe called it.
        device: where to put it; ``None`` leaves ``actor`` where it is, and builds on the CPU without one.

    Returns:
        Actor that reads ``(group, "observation")`` and writes ``(group, "action")``: deterministic ones, unless it is
        called under ``torchrl.envs.set_exploration_type(ExplorationType.RANDOM)``. A recurrent one also reads
        ``(group, "recurrent_state")``, zeros at the start of an episode, and writes the one to carry on under
        ``("next", group, "recurrent_state")``; :func:`torchrl_marl.modules.with_recurrent_state` does both, also for
        what Sable remembers. Several groups' actors act one after the other; ``policy[i]`` is that of group i.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, foreign or of another version, or ``actor`` is needed or does not fit.
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
    """What :func:`load_policy` needs to rebuild the actor that ``config``, with its ``_target_``, describes.

    For the actors of several groups, one after the other, it is a list.
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
    if build is None:  # importing what a file names would execute what a file says
        raise ValueError(
            f"The actor of {path} was built by {name}: if you trust it, say --actor {':'.join(name.rsplit('.', 1))}, "
            "or in Python build it and pass it as actor=."
        )
    options = {key: value for key, value in recorded["options"].items() if key != "value_norm"}  # the critic's
    try:
        built = build(GroupSpec(**recorded["shape"]), **options, device=device)
        return built[0] if isinstance(built, tuple) else built  # without the critic
    except Exception as error:  # of sizes and options that nobody has checked
        raise ValueError(f"{path} describes an actor that cannot be built: {reason(error)}") from error


def _bind(components: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint(format="archive")
    for name, component in components.items():
        plain = isinstance(component, dict)
        adapter = JSONCheckpointAdapter() if plain else StateDictCheckpointAdapter(payload_format="torch")
        checkpoint.register(name, component, adapter=adapter)
    return checkpoint


def _choose(path: str | Path, choose: Callable[[Mapping[Path, Mapping[str, Any]]], Path]) -> Path:
    path = Path(path).expanduser()
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
    raise FileNotFoundError(
        f"No checkpoint at {path}: name a checkpoint file or the folder of a run that has saved one."
    )


def _survey(folder: Path) -> tuple[dict[Path, dict[str, Any]], dict[Path, str]]:
    """Metadata of the checkpoints in a folder, oldest first, and what is wrong with those that cannot be read.

    ``CheckpointRotation`` passes over the latter without a word, and takes folders for checkpoints.
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
    """The manifest of a checkpoint, whose form has been checked; its values are still anyone's."""
    if not path.is_file():  # of a folder TorchRL would read TensorDicts, which execute the pickles that they hold
        raise ValueError(f"{path} is no file; a checkpoint of torchrl_marl is one, an archive.")
    try:
        manifest = Checkpoint.manifest(path)
        version = manifest["metadata"].get("version")
        if version == FORMAT_VERSION:
            _check_form(manifest["metadata"])
    except Exception as error:  # damaged archives raise anything, from NotImplementedError to UnicodeDecodeError
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
            # TorchRL also reads TensorDict payloads, which may hold pickles; ours never are one.
            if record["files"] != files.get(record["adapter"]) or not re.fullmatch(
                r"components/[^/\\]+", record["path"]
            ):
                raise ValueError(f"component {name!r} holds unexpected files {record['files']}")
        checkpoint.load(path, map_location="cpu")
    except Exception as error:  # as above
        pickled = isinstance(error.__cause__, pickle.UnpicklingError)  # which says how to execute it all the same
        why = "it holds more than tensors, which is not unpickled" if pickled else reason(error)
        raise ValueError(f"{path} cannot be loaded: {why}") from error
