"""Starts a tool server that ends with the backend: `python tool_child.py <pid of the backend> <command> [argument...]`.

Run by its path, as a program that imports nothing of the backend. The kernel kills the server when the backend ends,
however that ends; processes that the server starts are its own to end.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Replace this process by the command."""
    parent, *command = sys.argv[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent):
        sys.exit("the backend ended before its tool server started")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
