"""`make lab`: a port that cannot be used is named in plain words, and a screen is found where there is one."""

import socket

import pytest

from layerlr_helpers.course import check_environment
from tools import lab


def test_a_taken_port_is_named_with_what_to_do():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=rf"Port {port} is taken.* make lab PORT=8889"):
            lab.usable(str(port))


@pytest.mark.parametrize("port", ["", "abc", "0", "-1", "65536", "8 8"])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(SystemExit, match="A port is a number from 1 to 65535"):
        lab.usable(port)


def test_a_free_port_is_usable():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
    assert lab.usable(str(port)) == port


@pytest.mark.parametrize(("platform", "variable", "screen"), [
    ("linux", None, False), ("linux", "DISPLAY", True), ("linux", "WAYLAND_DISPLAY", True), ("darwin", None, True),
    ("win32", None, True)])
def test_a_screen_is_found_where_there_is_one(monkeypatch, platform, variable, screen):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, ":0")
    monkeypatch.setattr(lab.sys, "platform", platform)
    assert lab.has_screen() is screen


def test_the_lab_does_not_open_where_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(check_environment, "findings", lambda: [check_environment.disk(0.1)])
    with pytest.raises(SystemExit, match="Mend this, or open JupyterLab as it is"):
        lab.check_environment()
    assert "FAIL disk: 0.1 GiB free" in capsys.readouterr().out


def test_a_package_that_the_check_itself_needs_is_named(monkeypatch):
    monkeypatch.setitem(lab.sys.modules, "layerlr_helpers.course.check_environment", None)
    monkeypatch.delattr("layerlr_helpers.course.check_environment", raising=False)
    with pytest.raises(SystemExit, match=r"check_environment.*run `make setup`"):
        lab.check_environment()
