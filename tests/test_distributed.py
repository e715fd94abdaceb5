"""Processes that learn together take the steps of one process with all of their data."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("learn_in_parallel.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("parallel")
    subprocess.run([sys.executable, str(SCRIPT), str(folder / "alone")], check=True, timeout=280)
    subprocess.run([*TORCHRUN, str(SCRIPT), str(folder / "together")], check=True, timeout=280)
    return {
        "alone": [torch.load(folder / "alone0")],
        "together": [torch.load(folder / f"together{rank}") for rank in (0, 1)],
    }


@pytest.mark.parametrize("what", ["gradients", "value gradients"])
def test_averaged_gradients_are_those_of_the_whole_batch(what: str, results: dict[str, list[dict]]) -> None:
    (alone,) = results["alone"]
    first, second = results["together"]
    for expected, ours, others in zip(alone[what], first[what], second[what], strict=True):
        assert torch.equal(ours, others)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().max() > 1e-3 for gradient in alone[what])


def test_every_process_stores_the_steps_of_all_in_the_order_of_processes(results: dict[str, list[dict]]) -> None:
    (alone,) = results["alone"]
    for process in results["together"]:
        for expected, ours in zip(alone["buffer"], process["buffer"], strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("what", ["advantage", "value statistics"])
def test_statistics_are_those_of_the_whole_batch_bit_for_bit(what: str, results: dict[str, list[dict]]) -> None:
    (alone,) = results["alone"]
    for process in results["together"]:
        for expected, ours in zip(alone[what], process[what], strict=True):
            assert torch.equal(ours, expected)
    standardised = alone["advantage"][alone["advantage"] != 0]
    assert standardised.mean() == pytest.approx(0, abs=1e-6)
    assert standardised.std() == pytest.approx(1)


def test_the_first_process_decides_and_any_can_ask(results: dict[str, list[dict]]) -> None:
    for process in [*results["alone"], *results["together"]]:
        assert process["first decides"] == 10
        assert process["any"] == [True, False]
