"""Checkpoints of a run: one file each, written atomically, loaded without executing pickled code."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    JSONCheckpointAdapter,
    StateDictCheckpointAdapter,
)
from torchrl.modules import ProbabilisticActor

from torchrl_marl.modules import GroupShape, make_actor, make_recurrent_actor

__all__ = [
    "FORMAT_VERSION",
    "POLICY_BUILDERS",
    "CheckpointFolder",
    "best_checkpoint",
    "find_checkpoint",
    "load_policy",
    "read_metadata",
]

FORMAT_VERSION = 1
"""Version of what a checkpoint holds; it grows whenever a policy could no longer be read from an older file."""

POLICY_BUILDERS = {f"torchrl_marl.modules.{build.__name__}": build for build in (make_actor, make_recurrent_actor)}
"""What builds a policy that :func:`load_policy` can rebuild, by the name that a run's configuration gives it."""

_SCORE = "score"


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
        """Move checkpoints of more than ``frames`` frames to ``abandoned/``: the run goes on from an older one."""
        for path in self._rotation.checkpoints():
            if read_metadata(path)["frames"] > frames:
                target = path.parents[1] / "abandoned" / path.name
                target.parent.mkdir(exist_ok=True)
                path.replace(target)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint, if any."""
        return self._rotation.latest()

    @property
    def best(self) -> tuple[Path, float]:
        """The checkpoint of the highest score, and that score; of those that are there, as are its parameters."""
        path = cast("Path", self._rotation.best())
        return path, read_metadata(path)[_SCORE]


def find_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or the newest one of a run's folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    for folder in (path / "checkpoints", path):
        latest = CheckpointRotation(folder, keep_last=1).latest() if folder.is_dir() else None
        if latest is not None:
            return latest
    raise FileNotFoundError(
        f"No checkpoint at {path}: name a checkpoint file or the folder of a run that has saved one."
    )


def best_checkpoint(path: str | Path) -> Path:
    """Return a checkpoint file: ``path`` itself, or that of a run's folder with the highest score.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(path).expanduser() / "checkpoints"
    best = CheckpointRotation(folder, keep_last=1, keep_best=(_SCORE, "max")).best() if folder.is_dir() else None
    return best or find_checkpoint(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself (``config``, ``frames``, ``score``, ...) without loading tensors.

    Raises:
        ValueError: if the file is damaged, foreign or of another version.
    """
    try:
        metadata = Checkpoint.manifest(path)["metadata"]
    except (CheckpointError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a complete checkpoint of torchrl_marl: {error}") from error
    if metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {metadata.get('version')}; this release reads {FORMAT_VERSION}.")
    return metadata


def load_policy(
    path: str | Path, *, actor: TensorDictModuleBase | None = None, device: torch.device | str | None = None
) -> TensorDictModuleBase:
    """Load the decentralised policy of a run.

    It needs no environment and no critic: it acts from local observations alone.

    Args:
        path: a checkpoint file, or a run's folder (then its best checkpoint).
        actor: takes the parameters; needed only if the run built its actor with neither of this library's builders.
        device: where to put it; ``None`` leaves ``actor`` where it is, and builds on the CPU without one.

    Returns:
        Actor that reads ``(group, "observation")`` and writes ``(group, "action")``: deterministic ones, unless it is
        called under ``torchrl.envs.set_exploration_type(ExplorationType.RANDOM)``. A recurrent one also reads
        ``(group, "recurrent_state")``, zeros at the start of an episode, and writes the one to carry on under
        ``("next", group, "recurrent_state")``; :func:`torchrl_marl.modules.with_recurrent_state` does both. Several
        groups' actors act one after the other; ``policy[i]`` is that of group i.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, foreign or of another version, or ``actor`` is needed or does not fit.
    """
    path = best_checkpoint(path)
    if actor is None:
        recorded = read_metadata(path)["actor"]
        if isinstance(recorded, dict):
            actor = _rebuild(recorded, path, device)
        else:
            actor = TensorDictSequential([_rebuild(record, path, device) for record in recorded])
    _load(_bind({"actor": actor}), path)
    if device is not None:
        actor.to(device)
    return actor


def actor_record(shape: GroupShape | Sequence[GroupShape], config: Mapping[str, Any]) -> Any:
    """What :func:`load_policy` needs to rebuild the actor that ``config``, with its ``_target_``, describes.

    For the actors of several groups, one after the other, it is a list.
    """
    if not isinstance(shape, GroupShape):
        return [actor_record(own, config) for own in shape]
    options = {key: value for key, value in config.items() if key != "_target_"}
    return {"builder": config["_target_"], "shape": dataclasses.asdict(shape), "options": options}


def _rebuild(recorded: Mapping[str, Any], path: Path, device: torch.device | str | None) -> ProbabilisticActor:
    build = POLICY_BUILDERS.get(recorded["builder"])
    if build is None:  # importing what a file names would execute what a file says
        raise ValueError(f"The actor of {path} was built by {recorded['builder']}: build it and pass it as actor=.")
    return build(GroupShape(**recorded["shape"]), **recorded["options"], device=device)


def _bind(components: Mapping[str, Any]) -> Checkpoint:
    checkpoint = Checkpoint(format="archive")
    for name, component in components.items():
        plain = isinstance(component, dict)
        adapter = JSONCheckpointAdapter() if plain else StateDictCheckpointAdapter(payload_format="torch")
        checkpoint.register(name, component, adapter=adapter)
    return checkpoint


def _load(checkpoint: Checkpoint, path: Path) -> None:
    read_metadata(path)
    try:
        for name, record in Checkpoint.manifest(path)["components"].items():
            # TorchRL also reads TensorDict payloads, which may hold pickles; ours never are one.
            if record["files"] not in (["state.pt"], ["value.json"]):
                raise ValueError(f"component {name!r} holds unexpected files {record['files']}")
        checkpoint.load(path, map_location="cpu")
    except (CheckpointError, OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
