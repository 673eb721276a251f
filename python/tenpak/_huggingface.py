"""Makes transformers know tenpak's checkpoints, without importing it: nothing here is heavy, and nothing is decided.

``import tenpak`` must be cheap and must not need transformers, yet afterwards ``from_pretrained`` should take a
directory of planes, whichever of the two was imported first. So where transformers' table of quantizers is not loaded
yet, a finder waits for it and adds the entry when it is.
"""

import sys
from typing import Any

from ._types import Path

#: The module with transformers' table of quantizers.
_TABLE = "transformers.quantizers.auto"


def _register() -> None:
    """Add the entry to transformers' table, which is loaded."""
    try:
        from .huggingface import _quantizer
    except ImportError:
        return  # transformers without PyTorch loads no models
    _quantizer.register()


class _Loader:
    """Loads the table and adds the entry; a loader by its methods, since the base classes take time to import."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        # From here on the module is what it would have been without us, for whoever looks at its source.
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


class _Finder:
    """Waits for the table to be imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _TABLE:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


def watch() -> None:
    """Add the entry now, where the table is loaded, or when it will be; a second call changes nothing."""
    if _TABLE in sys.modules:
        _register()
    elif not any(type(finder).__name__ == _Finder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def from_pretrained(path: Path, *, act: str | None = None, mmap: bool = False, **options: Any) -> Any:
    """Load a compressed model for transformers, its weights as planes: no dense copy of them is ever made.

    Parameters
    ----------
    path
        An artifact that carries its model's ``config.json``, or a directory that ``compress`` or ``save_pretrained``
        wrote; also the id of one on the Hub.
    act
        Arithmetic of products: ``"float32"``, ``"bfloat16"`` or ``"int8"``, see :func:`tenpak.matmul`; by default the
        one that goes with the dtype of activations.
    mmap
        Map the planes of a single file instead of reading them: no copy, and processes share them, but whoever cuts the
        file short then ends them all.
    **options
        As for transformers' ``from_pretrained``: ``dtype`` (of activations and of what is not quantized),
        ``device_map``, ``attn_implementation`` …

    Returns
    -------
    transformers.PreTrainedModel
        Of the class that the config names; with ``mmap`` planes of a single file are views of it.

    Raises
    ------
    ImportError
        PyTorch or transformers is not installed, or transformers is older than 5.
    InvalidError
        There is no such arithmetic, or the artifact carries no config or one whose classes transformers does not have.
    CorruptError
        Planes are missing or do not fit the config.
    UnsupportedError
        A codec or a module that this build does not know.
    """
    from .huggingface import from_pretrained as load

    return load(path, act=act, mmap=mmap, **options)
