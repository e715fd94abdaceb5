"""Checkpoints are complete or absent, say what is wrong with them, and never execute what they hold."""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import ExplorationType, set_exploration_type

import torchrl_marl.run.checkpoints as checkpoints
from torchrl_marl.modules import GroupSpec, make_actor
from torchrl_marl.run.checkpoints import CheckpointFolder, actor_record, find_checkpoint, load_policy, read_metadata

SHAPE = GroupSpec("agents", num_agents=2, observation_size=3, action_low=(-1.0, -2.0), action_high=(1.0, 2.0))
OPTIONS = {"hidden_sizes": [8], "activation": "relu"}
CONFIG = {"_target_": "torchrl_marl.modules.make_actor", **OPTIONS}


def new_parts() -> dict:
    actor = make_actor(SHAPE, **OPTIONS)
    optimizer = torch.optim.Adam(actor.parameters(), lr=0.1)
    return {"actor": actor, "optimizer": optimizer, "progress": {"frames": 0, "history": [[0, 0.5]]}}


def train_a_step(parts: dict) -> None:
    sum(parameter.square().sum() for parameter in parts["actor"].parameters()).backward()
    parts["optimizer"].step()
    parts["optimizer"].zero_grad()
    parts["progress"]["frames"] += 10


def save(folder: Path, parts: dict, frames: int = 10, score: float = 1.0) -> Path:
    metadata = {"config": {"seed": 0}, "actor": actor_record(SHAPE, CONFIG), "frames": frames}
    return CheckpointFolder(folder / "checkpoints", **parts).save(frames=frames, score=score, metadata=metadata)


def rewrite(path: Path, change: dict[str, bytes]) -> None:
    """Replace members of a checkpoint, keeping it a valid archive."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, **change}.items():
            archive.writestr(name, data)


def test_a_restored_state_continues_as_the_saved_one_would_have(tmp_path: Path) -> None:
    parts, restored = new_parts(), new_parts()
    train_a_step(parts)
    path = save(tmp_path, parts)
    CheckpointFolder(tmp_path / "checkpoints", **restored).load(path)
    train_a_step(parts)
    train_a_step(restored)  # equal only if Adam's moments and step count came back too
    for expected, actual in zip(parts["actor"].parameters(), restored["actor"].parameters(), strict=True):
        assert torch.equal(expected, actual)
    assert restored["progress"] == {"frames": 20, "history": [[0, 0.5]]}


def test_a_policy_is_rebuilt_without_environment_and_acts_within_its_bounds(tmp_path: Path) -> None:
    parts = new_parts()
    save(tmp_path, parts)
    policy = load_policy(tmp_path)
    for expected, actual in zip(parts["actor"].parameters(), policy.parameters(), strict=True):
        assert torch.equal(expected, actual)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        observations = TensorDict({"agents": {"observation": 9 * torch.randn(500, 2, 3)}}, batch_size=500)
        actions = policy(observations)["agents", "action"]
    assert actions.abs().amax((0, 1))[0] <= 1
    assert 1 < actions.abs().amax((0, 1))[1] <= 2


def test_the_two_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    parts = new_parts()
    for frames, score in ((0, 0.0), (10, 7.0), (20, 3.0), (30, 5.0), (40, 4.0)):
        save(tmp_path, parts, frames, score)
    kept = sorted(read_metadata(path)["frames"] for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [10, 30, 40]
    assert read_metadata(find_checkpoint(tmp_path))["frames"] == 40
    CheckpointFolder(tmp_path / "checkpoints", **parts).set_aside_beyond(30)
    assert read_metadata(find_checkpoint(tmp_path))["frames"] == 30
    assert [path.name for path in (tmp_path / "abandoned").iterdir()] == ["checkpoint-000000000040.torchrl"]


def test_load_policy_takes_the_best_of_a_run_and_an_actor_of_ones_own(tmp_path: Path) -> None:
    parts = new_parts()
    save(tmp_path, parts, 10, 7.0)
    best = [parameter.clone() for parameter in parts["actor"].parameters()]
    train_a_step(parts)
    save(tmp_path, parts, 20, 3.0)
    for policy in (load_policy(tmp_path), load_policy(tmp_path, actor=new_parts()["actor"])):
        assert all(torch.equal(a, b) for a, b in zip(best, policy.parameters(), strict=True))


def test_an_actor_of_another_builder_must_be_passed_in(tmp_path: Path) -> None:
    parts = new_parts()
    metadata = {"config": {}, "actor": actor_record(SHAPE, {"_target_": "mine.build"}), "frames": 1}
    path = CheckpointFolder(tmp_path, **parts).save(frames=1, score=0.0, metadata=metadata)
    with pytest.raises(ValueError, match=r"built by mine\.build.*pass it as actor="):
        load_policy(path)
    assert load_policy(path, actor=new_parts()["actor"]) is not None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = new_parts()
    good = save(tmp_path, parts, frames=10)
    before = good.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, parts, frames=20)
    assert find_checkpoint(tmp_path) == good
    assert good.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_checkpoint_is_named_and_changes_nothing(damage: str, tmp_path: Path) -> None:
    parts = new_parts()
    path = save(tmp_path, parts)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(component_member(path, "actor"))
        data[member.header_offset + 30 + len(member.filename) + member.file_size // 2] ^= 1  # one bit of the tensors
    contents = {"truncated": data[: len(data) // 2], "flipped": data, "empty": b"", "foreign": b"not a checkpoint"}
    path.write_bytes(contents[damage])
    train_a_step(parts)
    before = [parameter.clone() for parameter in parts["actor"].parameters()]
    with pytest.raises(ValueError, match=path.name):
        CheckpointFolder(tmp_path / "checkpoints", **parts).load(path)
    assert parts["progress"]["frames"] == 10
    assert all(torch.equal(a, b) for a, b in zip(before, parts["actor"].parameters(), strict=True))


def test_whatever_bit_of_an_archives_directory_is_flipped_ends_in_a_policy_or_one_line(tmp_path: Path) -> None:
    good = save(tmp_path, new_parts()).read_bytes()
    path = tmp_path / "flipped.torchrl"
    entry = good.rindex(b"PK\x01\x02")  # that of the manifest, the last member
    assert good[entry + 46 :].startswith(b"manifest.json")
    refused = 0
    for bit in range(8 * 46):
        data = bytearray(good)
        data[entry + bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refused += len(refusals_of(path))
    assert refused > 100  # the rest are dates and the like, and change nothing


def refusals_of(path: Path) -> list[str]:
    try:
        load_policy(path)
    except ValueError as error:
        return re.findall(rf"\A{path} [^\n]*\Z", str(error)) or pytest.fail(f"more than a line: {error}")
    return []


@pytest.mark.parametrize("read", [find_checkpoint, load_policy])
def test_damaged_checkpoints_of_a_run_are_named_with_the_one_used_instead(read, tmp_path: Path) -> None:
    parts = new_parts()
    best, older, newest = (save(tmp_path, parts, frames, score) for frames, score in ((1, 9.0), (2, 1.0), (3, 2.0)))
    damaged, used = (newest, older) if read is find_checkpoint else (best, newest)
    damaged.write_bytes(damaged.read_bytes().replace(b'"version"', b'"verzion"'))
    message = rf"{damaged} is not a complete checkpoint.*BadZipFile|{damaged}[^\n]* Passed over, {used} is used\."
    with pytest.warns(UserWarning, match=message):
        read(tmp_path)
    for path in (best, older, newest):
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=rf"^[^\n]*{newest} is not a complete checkpoint[^\n]*$"):
        read(tmp_path)


@pytest.mark.parametrize("score", ["high", True, float("inf"), None, [1.0]])
def test_a_score_that_is_no_number_is_refused(score: object, tmp_path: Path) -> None:
    path = save(tmp_path, new_parts())
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["metadata"]["score"] = score
    rewrite(path, {"manifest.json": json.dumps(manifest).encode()})
    for read in (load_policy, find_checkpoint):
        with pytest.raises(ValueError, match=rf"{path.name} is not a complete checkpoint.*score is "):
            read(tmp_path)


class Malice:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def component_member(path: Path, component: str) -> str:
    with zipfile.ZipFile(path) as archive:
        return next(name for name in archive.namelist() if f"-{component}/" in name)


def test_a_pickle_in_place_of_tensors_is_refused_and_not_executed(tmp_path: Path) -> None:
    path = save(tmp_path, new_parts())
    proof = tmp_path / "executed"
    rewrite(path, {component_member(path, "actor"): pickle.dumps(Malice(proof))})
    with pytest.raises(ValueError, match=path.name):
        load_policy(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Malice(proof)))  # the same bytes do execute where nobody refuses them
    assert proof.exists()


def test_a_payload_of_another_kind_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    # TorchRL's reader would also take a TensorDict folder, whose non-tensor entries are pickles
    path = save(tmp_path, new_parts())
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    manifest["components"]["actor"]["files"] = ["state/meta.json", "state/other.pickle"]
    rewrite(path, {"manifest.json": json.dumps(manifest).encode()})
    with pytest.raises(ValueError, match=r"unexpected files.*other\.pickle"):
        load_policy(path)


def test_another_version_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, new_parts())
    monkeypatch.setattr(checkpoints, "FORMAT_VERSION", 99)
    with pytest.raises(ValueError, match="has version 1; this release reads 99"):
        read_metadata(path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, new_parts())
    with pytest.raises(ValueError, match=path.name):
        CheckpointFolder(tmp_path, actor=nn.Linear(1, 1)).load(path)


def test_a_path_without_checkpoint_says_what_to_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match="name a checkpoint file or the folder of a run"):
            find_checkpoint(path)
