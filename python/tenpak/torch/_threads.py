"""Products on PyTorch's own threads."""

import ctypes
import sys
from pathlib import Path

import torch

from .. import _tenpak


def share_threads() -> bool:
    """Let products of this process run on the OpenMP threads of PyTorch, as many as ``torch.get_num_threads()``.

    Those spin for a while after every loop of PyTorch's, and threads of tenpak's own would compete with them. Returns
    whether PyTorch's library has what that needs: elsewhere (macOS, Windows) products keep to their own threads.
    """
    if sys.platform != "linux":
        return False
    try:
        # Looking a name up in a library looks through those that it was linked with, so this finds the OpenMP that
        # PyTorch uses, whatever others the process has loaded.
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = (library.GOMP_parallel, library.omp_get_max_threads)
    except (OSError, AttributeError):
        return False
    parallel, max_threads = (ctypes.cast(name, ctypes.c_void_p).value or 0 for name in names)
    _tenpak.use_openmp(parallel, max_threads)
    return True
