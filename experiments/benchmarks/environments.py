"""Environments of peers: each is installed by pip into one of its own, never beside the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# What to install, in order of preference: a build for CPUs alone is found only where an index
# offers it.
PACKAGES = {
    "torch": (("torch==2.13.0+cpu", "numpy"), ("torch==2.13.0", "numpy")),
    "tensorflow": (("tensorflow==2.21.0", "tf_keras==2.21.0", "tensorflow-recommenders==0.7.7"),),
    "rectools": (("rectools==0.19.0",),),
    "ranx": (("ranx==0.3.21",),),
    "fastapi": (("fastapi==0.165.0",),),
}


def python_with(peer: str, root: str = "") -> str | None:
    """Returns the interpreter that has a peer, installed where needed; None, and a line that says
    why, where that cannot be.

    Args:
        peer: Key of `PACKAGES`.
        root: Folder of the environments; by default one in the user's cache folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    folder = Path(root or f"{cache}/twotower/peers").expanduser() / peer
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return str(python)
    print(f"Installing {peer} into {folder}.", flush=True)
    error = _run(sys.executable, "-m", "venv", str(folder))
    for packages in PACKAGES[peer]:
        error = _run(str(python), "-m", "pip", "install", "--quiet", *packages)
        if not error:
            (folder / "ready").touch()
            return str(python)
    print(
        f"Without {peer}, which cannot be installed: {error.strip().splitlines()[-1]}", flush=True
    )
    return None


def _run(*command: str) -> str:
    """Returns the error of a command; empty if there was none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"
