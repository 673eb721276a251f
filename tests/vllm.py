"""The plugin in vLLM itself: greedy tokens of a compressed directory, against transformers on the decoded weights.

``python tests/vllm.py [MODEL_DIR] [--parts N]`` needs vLLM, which is gigabytes and wants a GPU or its build for CPUs,
so the everyday tests use stand-ins. Prompts are token ids, so that no tokenizer is needed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tenpak
import torch
from transformers import AutoModelForCausalLM

CODECS = ("int4_g32_fp16_v1", "int4_sym_g32_fp16_v1", "int8_sym_g32_fp16_v1")
PROMPT = [5, 17, 2, 90, 33, 8, 41]


def main() -> int:
    """Print a row per codec; 1 where tokens differ."""
    parser = argparse.ArgumentParser(description="the plugin in vLLM itself")
    parser.add_argument("model", type=Path, nargs="?", default=Path(__file__).parent / "data" / "tiny-books")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--parts", type=int, default=1, help="tensor parallel size")
    arguments = parser.parse_args()
    # This file has vLLM's name too.
    here = Path(__file__).resolve().parent
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != here]
    import vllm

    wrong = 0
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            planes, decoded = Path(folder) / "planes", Path(folder) / "decoded"
            tenpak.compress(arguments.model, planes, codec=codec)
            tenpak.decompress(planes, decoded, dtype="F32")
            model = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)
            ids = torch.tensor([PROMPT])
            want = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.tokens, do_sample=False
            )[0][len(PROMPT) :].tolist()
            engine = vllm.LLM(
                str(planes),
                dtype="float32",
                tensor_parallel_size=arguments.parts,
                enforce_eager=True,
                max_model_len=128,
            )
            how = vllm.SamplingParams(temperature=0.0, max_tokens=arguments.tokens)
            out = engine.generate([{"prompt_token_ids": PROMPT}], how)[0].outputs[0].token_ids
        agree = sum(a == b for a, b in zip(want, out, strict=False))
        wrong += agree != len(want)
        print(f"{codec:24} {agree} of {len(want)} tokens agree", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
