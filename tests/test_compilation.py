"""Compiled functions: each with code of its own, and uncompiled where the compiler is missing."""

import os

import pytest
import torch

from torchrl_marl.compilation import compile_whole, keep_compiled_code


def adder(number):
    def add(values):
        return values + number

    return add


def test_more_functions_of_the_same_code_than_dynamo_keeps_graphs_for_are_compiled():
    compiled = [
        compile_whole(adder(number), backend="eager") for number in range(torch._dynamo.config.recompile_limit + 2)
    ]
    assert [function(torch.zeros(())).item() for function in compiled] == list(range(len(compiled)))


def test_without_a_compiler_a_function_runs_uncompiled_and_a_warning_says_once_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("torchrl_marl.compilation._warned", set())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    functions = [compile_whole(adder(number)) for number in (1, 2)]
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.warns(UserWarning, match=r"goes on uncompiled.*apt install g\+\+ python3-dev") as warned:
        values = [function(torch.ones(())).item() for function in functions for _ in range(2)]
    assert values == [2.0, 2.0, 3.0, 3.0]
    assert sum("goes on uncompiled" in str(warning.message) for warning in warned) == 1  # Torch warns of its own


def test_an_error_of_the_function_itself_stays_one():
    def refuse(values):
        raise ValueError("no such values")

    with pytest.raises(ValueError, match="no such values"):
        compile_whole(refuse)(torch.ones(3))


def test_what_cannot_be_compiled_in_one_piece_runs_uncompiled():
    def double(values):
        torch._dynamo.graph_break()
        return 2 * values

    with pytest.warns(UserWarning, match="goes on uncompiled.*what failed: .*graph_break"):
        assert compile_whole(double)(torch.ones(())).item() == 2


@pytest.mark.parametrize("named", [None, "/somewhere"])
def test_compiled_code_is_kept_in_the_users_cache_unless_the_environment_names_a_folder(named, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", named or "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if named is None:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == (named or str(tmp_path / "inductor"))
