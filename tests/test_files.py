"""Files that are there as a whole or not at all, and errors that name the file and the cause."""

import errno
import os
import resource
import signal

import pytest
import torch

from layerlr_helpers.files import is_utf8, save_whole, shown, write_whole


def test_writing_that_fails_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, write_half)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_whole(tmp_path / "a.txt", lambda path: path.write_text("new"))
    assert done == ["fsync", "replace"]
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.fixture
def small_files_only():
    """No file can grow beyond 100,000 bytes, as if the disk were full then."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", [
    lambda path: save_whole(path, {"a": torch.zeros(300, 300), "b": [torch.zeros(50)] * 3}),
    lambda path: save_whole(path, [torch.zeros(20, 20) for _ in range(100)]),
    lambda path: write_whole(path, lambda temporary: temporary.write_bytes(bytes(200_000))),
])
def test_a_disk_that_fills_up_is_named_with_the_file_and_nothing_half_written_is_left(tmp_path, small_files_only, write):
    path = tmp_path / "a.pt"
    path.write_text("old")
    with pytest.raises(OSError, match=r"cannot write .*a\.pt: File too large") as raised:
        write(path)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_an_error_at_the_very_end_is_named_too(tmp_path, monkeypatch, what):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, what, full)
    with pytest.raises(OSError, match=r"cannot write .*a\.pt: No space left on device"):
        save_whole(tmp_path / "a.pt", [1])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "kind"), [
    ("n" * 300, OSError), ("nowhere/a.pt", FileNotFoundError), ("file/a.pt", NotADirectoryError),
    ("folder", IsADirectoryError)])
def test_a_place_where_no_file_can_be_is_named(tmp_path, name, kind):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(kind, match=f"cannot write .*{name}: "):
        save_whole(tmp_path / name, [1])
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder"}


def test_an_error_that_is_not_the_disks_stays_as_it_is(tmp_path):
    def wrong(temporary):
        raise RuntimeError("of the writer's own")

    with pytest.raises(RuntimeError, match="of the writer's own"):
        write_whole(tmp_path / "a", wrong)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "a.pt").symlink_to(tmp_path / "large_disk" / "b.pt")
    for content in ([1], [2]):
        save_whole(tmp_path / "a.pt", content)
        assert torch.load(tmp_path / "large_disk" / "b.pt") == content
    assert (tmp_path / "a.pt").is_symlink()
    assert [entry.name for entry in (tmp_path / "large_disk").iterdir()] == ["b.pt"]


def test_a_name_that_is_not_utf8_can_be_written_and_shown(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.pt")
    save_whole(path, [1])
    assert torch.load(path) == [1]
    assert not is_utf8(path)
    assert shown(path).endswith(r"/caf\xe9.pt'")
    assert (is_utf8("café"), shown("café")) == (True, "café")
