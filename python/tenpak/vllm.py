"""vLLM on planes: the plugin that lets it serve a compressed directory, with tensor parallelism.

``pip install tenpak`` beside vLLM is all: vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and
calls it in every one of its processes, any number of times. Nothing heavy is imported before.
"""

__all__ = ["register"]


def register() -> None:
    """Tell vLLM of ``quant_method`` ``tenpak``; doing so again changes nothing."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    if "tenpak" not in QUANTIZATION_METHODS:
        from . import _vllm

        _vllm.register()
