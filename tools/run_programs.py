"""Run every program in a folder and show what each prints: ``python tools/run_programs.py FOLDER``.

For programs that show how something goes wrong, or no longer does. What needs a library that is not installed says so.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path


def outcome(program: Path, timeout: float) -> str:
    """What a program printed, and how it ended if that was not in peace."""
    try:
        done = subprocess.run([sys.executable, "-W", "ignore", str(program)], capture_output=True, text=True, errors="replace",
                              timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"did not end within {timeout:.0f} s"
    if missing := re.search(r"ModuleNotFoundError: No module named '(\w+)", done.stderr):
        return f"needs {missing[1]}, which is not installed"
    ended = "" if done.returncode == 0 else f"\n[exit code {done.returncode}] {done.stderr.strip()[-600:]}"
    return done.stdout.strip() + ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each program")
    args = parser.parse_args()
    programs = sorted(args.folder.glob("*.py"))
    if not programs:
        parser.error(f"there is no program in {args.folder}")
    for program in programs:
        print(f"--- {program.stem}\n{outcome(program, args.timeout)}\n", flush=True)


if __name__ == "__main__":
    main()
