"""Open JupyterLab at the first notebook: `make lab` runs this. Other options than --port and --read go on to JupyterLab.

A learner works in copies without outputs, in the folder learn/, so that no answer is on the screen before its question has
been read. A copy is made once, and what a learner has written is never overwritten.
"""

import argparse
import errno
import os
import sys
from pathlib import Path
from socket import create_server

from jupyterlab.labapp import LabApp

ROOT = Path(__file__).resolve().parent.parent
FIRST = "01_layer_lr_theory.ipynb"
# No lines about what JupyterLab loads, no question whether it may fetch news, no look for a newer version of itself, no
# warning at each kernel's start that others on this machine could listen in, since they cannot.
QUIETLY = ["--ServerApp.log_level=WARN", "--LabApp.log_level=WARN", "--LabApp.news_url=None",
           "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--KernelManager.transport_encryption=auto"]


def main() -> None:
    """Start the server, print its address, and open a browser where there is a screen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", help="this port and no other (default: 8888, or the next one that is free)")
    parser.add_argument("--read", action="store_true", help="open the notebooks that have been run, in place of your copies")
    options, others = parser.parse_known_args()
    check_environment()
    if not options.read:
        from layerlr_helpers.course.learners_copy import make_copies  # here, since the check has to come first

        for path in make_copies(ROOT / "notebooks", ROOT / "learn"):
            print(f"made {path.relative_to(ROOT)}")
    first = f"/lab/tree/{'notebooks' if options.read else 'learn'}/{FIRST}"
    settings = [f"--ServerApp.root_dir={ROOT}", f"--LabApp.default_url={first}", *QUIETLY, *others]
    if options.port:
        settings += [f"--port={usable(options.port)}", "--ServerApp.port_retries=0"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        settings.append("--allow-root")  # as in most containers
    if not has_screen():
        settings.append("--no-browser")
    server = LabApp.initialize_server(settings)
    server.log.addFilter(lambda record: "To access the server" not in record.getMessage())  # said below, in fewer words
    server.io_loop.add_callback(print, f"\nJupyterLab is running. If no browser shows it, open this address in one:\n\n"
                                       f"    {server.display_url}\n\nPress Ctrl-C twice to stop it.", flush=True)
    server.start()


def check_environment() -> None:
    """Ends the program if something is missing that the notebooks need, after saying what."""
    try:
        from layerlr_helpers.course import check_environment
    except ImportError as error:  # the check itself needs a few packages
        sys.exit(f"FAIL {error}; run `make setup`. If that has been done, delete the folder .venv and run it again")
    if check_environment.main():
        sys.exit("Mend this, or open JupyterLab as it is: .venv/bin/python -m jupyterlab")


def has_screen() -> bool:
    """Whether a browser can open a window; on Linux a variable says so."""
    return sys.platform in ("darwin", "win32") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def usable(port: str) -> int:
    """The port as a number; ends the program with a plain message if nobody can listen there."""
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        sys.exit(f"A port is a number from 1 to 65535, not {port!r}; for instance make lab PORT=8889")
    try:
        create_server(("localhost", int(port))).close()
    except PermissionError:
        sys.exit(f"Only the administrator may use port {port}. Choose one above 1023, for instance make lab PORT=8889")
    except OSError as failure:
        if failure.errno != errno.EADDRINUSE:
            raise
        other = 8890 if int(port) == 8889 else 8889
        sys.exit(f"Port {port} is taken by another program. Choose another one, for instance make lab PORT={other}")
    return int(port)


if __name__ == "__main__":
    main()
