import sys

from torchrl_marl.extras import import_extra


def test_what_a_package_prints_is_dropped_and_its_loggers_keep_standard_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "talkative.py").write_text(
        "import logging, sys\nprint('more')\nhandler = logging.StreamHandler()\nsys.stdout = sys.__stdout__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = sys.stdout
    module = import_extra("talkative", "extra")
    assert sys.stdout is before
    assert module.handler.stream is sys.stderr
    assert capsys.readouterr().out == ""
