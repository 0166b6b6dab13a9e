"""Running the programs of a folder: what each printed, how it ended, and which library it lacks."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "run_programs.py"


def run(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, folder, "--timeout", "20"], capture_output=True, text=True)


def test_each_program_is_run_and_its_end_is_told(tmp_path):
    (tmp_path / "a_fine.py").write_text("print('two', 1 + 1)")
    (tmp_path / "b_fails.py").write_text("print('before')\n1 / 0")
    (tmp_path / "c_lacks.py").write_text("import no_such_library")
    printed = run(tmp_path).stdout
    fine, fails, lacks = printed.split("--- ")[1:]
    assert fine.split() == ["a_fine", "two", "2"]
    assert "before" in fails
    assert "[exit code 1]" in fails
    assert "ZeroDivisionError" in fails
    assert "needs no_such_library, which is not installed" in lacks


def test_a_folder_without_programs_is_an_error(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 2
    assert "no program in" in done.stderr
