"""Where NVIDIA's compiler of kernels is, when it came as a wheel: PyTorch brings it along."""

from importlib.util import find_spec
from pathlib import Path


def find(major: str | None = None) -> Path | None:
    """Return the path of NVRTC among installed packages.

    Parameters
    ----------
    major
        Major version of CUDA that it should have; without one the newest is taken.

    Returns
    -------
    pathlib.Path or None
        The library; None where no wheel of it is installed.
    """
    try:
        spec = find_spec("nvidia")
    except (ImportError, ValueError):
        return None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [
        path
        for folder in folders
        for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*", "c*/bin/**/nvrtc64_*_0.dll")
        for path in folder.glob(pattern)
        if "alt" not in path.name and "builtins" not in path.name
    ]
    wanted = [path for path in found if major is None or _major(path) == int(major)]
    return max(wanted, key=_major, default=None)


def _major(path: Path) -> int:
    """Return the major version in a library's name: libnvrtc.so.13, nvrtc64_130_0.dll."""
    digits = "".join(c for c in path.name.removeprefix("nvrtc64").split("_0.dll")[0].split(".so.")[-1] if c.isdigit())
    return int(digits[:2] or 0)
