"""What compile=auto chooses, from the configuration alone."""

import runpy

import pytest
from omegaconf import OmegaConf

from tests.recipes.runs import RECIPES, run_folders, run_recipe


def compile_of(*overrides: str, recipe: str = "mars_vmas") -> bool:
    return runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"].compose(overrides).compile


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),  # 360 000 frames of VMAS: 6 000 steps and 1 800 updates save 30 + 9 s
        (["total_frames=60_000"], False),
        (["env.num_envs=600", "minibatch_size=6000"], False),  # a tenth of the steps, a sixth of the updates
        (["env=coordsum"], False),  # 6 000 steps save 8 s, updates 9
        (["env=coordsum", "total_frames=1_000_000"], True),
        (["actor=gru", "critic=gru"], False),
        (["actor=gru", "critic=gru", "total_frames=3_000_000"], True),
        (["actor=gru", "critic=gru", "total_frames=800_000"], True),  # 13 333 steps of 5.4 ms, 4 000 updates of 15 ms
        (["actor=mat", "total_frames=800_000"], False),  # 13 333 steps of 5.4 ms, 4 000 updates of 9 ms: 108 s
        (["actor=sable", "total_frames=700_000"], True),  # 11 667 steps of 6.8 ms, 3 500 updates of 12 ms: 121 s
        (["loss=seac"], False),  # networks for each agent: 34 s saved, and 120 s to compile
        (["collector=multiprocess"], False),  # updates alone save 9 s
        (["total_frames=80", "compile=true"], True),
        (["compile=false"], False),
    ],
)
def test_long_runs_are_compiled(overrides: list[str], expected: bool) -> None:
    assert compile_of(*overrides) is expected


@pytest.mark.parametrize("recipe", ["magpo_vmas", "oappo_vmas", "marpo_vmas"])
def test_guiders_phases_and_chunks_take_longer_to_compile(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    assert [compile_of(f"total_frames={total}", recipe=recipe) for total in (360_000, 2_000_000)] == [False, True]


def test_updates_of_guider_and_learner_save_ten_times_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    rows = ["env.num_envs=64", "frames_per_batch=2048", "minibatch_size=512", "epochs=4", "total_frames=512_000"]
    # 4 000 updates of 25 ms, 8 000 steps of 3.5 ms: 128 s
    assert compile_of("+experiment=magpo_coordsum", *rows, recipe="magpo_vmas")
    assert not compile_of("env=coordsum", *rows)


def test_updates_from_a_replay_buffer_save_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    frames = [72_000, 144_000]  # 1 200 steps of 1.3 ms and 600 updates of 25.4 ms: 17 s; twice that: 34 s
    chosen = [compile_of("env=coordsum", f"total_frames={total}", recipe="qmix_vmas") for total in frames]
    assert chosen == [False, True]


def test_a_run_says_what_it_chose_and_goes_on_with_it(tmp_path, monkeypatch, capsys) -> None:
    run_recipe(monkeypatch, tmp_path, "total_frames=80")
    assert "compile=auto does not compile: 10 steps and 4 updates save some 0 s" in capsys.readouterr().out
    (folder,) = run_folders(tmp_path)
    assert OmegaConf.load(folder / "config.yaml").compile is False
    assert compile_of("total_frames=10_000_000") is True
    assert compile_of(f"resume={folder}", "total_frames=10_000_000") is False
