"""Models of Hugging Face on planes: ``AutoModelForCausalLM.from_pretrained(directory)`` after ``import tenpak``.

transformers and PyTorch are imported here and nowhere before.
"""

try:
    import transformers as _transformers

    if int(_transformers.__version__.split(".")[0]) < 5:
        raise ImportError(
            f"transformers {_transformers.__version__} is too old, expected 5 or later; pip install 'transformers>=5'"
        )
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise ImportError(
        "models of Hugging Face need PyTorch and transformers 5 or later, and one is not installed; "
        "pip install 'tenpak[torch,hf]'"
    ) from _error

# First the table, whose loading registers the quantizer: not while the quantizer itself is half imported.
import transformers.quantizers.auto as _table  # noqa: F401

from ._load import from_pretrained
from ._quantizer import TenpakConfig, TenpakQuantizer

__all__ = ["TenpakConfig", "TenpakQuantizer", "from_pretrained"]
