"""Build `idle.cpp` with its `device.h`, and the environment of a process that has it before torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

_SOURCE = Path(__file__).with_name("idle.cpp")
_HEADER = Path(__file__).with_name("device.h")
PRELOAD = "LD_PRELOAD"


def build(folder: Path | None = None) -> Path:
    """The library of `idle.cpp` for the torch that is installed here; compiled once, which takes some ten seconds.

    Args:
        folder: Where it is kept; by default in the temporary folder, by a hash of its source and of torch's version.

    Raises:
        RuntimeError: There is no C++ compiler, or it refuses; the message ends with what it says. Or torch is built
            with CUDA, whose own device is in the way.
    """
    import torch

    if torch.version.cuda is not None and torch.backends.cuda.is_built():
        raise RuntimeError(f"torch {torch.__version__} is built with CUDA: an idle device needs a build without")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    sources = _SOURCE.read_bytes() + _HEADER.read_bytes()
    key = hashlib.sha256(sources + torch.__version__.encode() + str(root).encode()).hexdigest()[:16]
    folder = folder or Path(tempfile.gettempdir(), f"pretend_gpu-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # what is in it would be loaded
        raise RuntimeError(f"{folder} belongs to somebody else: name another folder")
    library = folder / f"idle-{key}.so"
    if library.exists():
        return library
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as file:
        made = Path(file.name)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{root / 'include'}"]
    command += [
        str(_SOURCE),
        f"-L{root / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
        f"-Wl,-rpath,{root / 'lib'}",
        "-o",
        str(made),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        made.unlink()
        raise RuntimeError(f"no idle device: {getattr(error, 'stderr', None) or error}") from error
    made.rename(library)  # whole or not there, however many build it at once
    return library


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a Python process in which `idle_h100` works.

    Raises:
        RuntimeError: As `build`.
    """
    return {**(os.environ if given is None else given), PRELOAD: str(build())}
