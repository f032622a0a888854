"""Lines of the log: plain on the first rank, with rank and step on the others, results and warnings apart."""

import logging

import pytest

from ovr_megatron.runtime import logs
from ovr_megatron.runtime.logs import NOTICE, get_logger, set_step


@pytest.fixture(autouse=True)
def fresh_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_step", None)


def write_lines() -> None:
    logger = get_logger("ovr_megatron.some.room")
    logger.debug("nobody reads this")
    logger.info("layers: local")
    logger.log(NOTICE, "notice: a file is read")
    logger.warning("100% of the \x1b disk is full")
    logger.error("it ends")


def test_the_first_rank_writes_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (None, "0"):
        monkeypatch.delenv("RANK", raising=False)
        if rank:
            monkeypatch.setenv("RANK", rank)
        set_step(3)
        write_lines()
        out, err = capsys.readouterr()
        assert out == "layers: local\n"
        assert err == "notice: a file is read\nwarning: 100% of the \\x1b disk is full\nerror: it ends\n"


def test_other_ranks_say_which_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "12")
    write_lines()
    set_step(7)
    write_lines()
    out, err = capsys.readouterr()
    assert out == "[rank 12] layers: local\n[rank 12, step 7] layers: local\n"
    assert err.splitlines()[1::3] == [
        "[rank 12] warning: 100% of the \\x1b disk is full",
        "[rank 12, step 7] warning: 100% of the \\x1b disk is full",
    ]


def test_handlers_of_libraries_do_not_double_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        write_lines()
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err.count("it ends") == 1
