"""Greedy tokens of llama.cpp on exported files, against transformers on the decoded weights.

``python tests/engines.py`` needs ``pip install llama-cpp-python``, which compiles llama.cpp for minutes, so the
everyday tests do without it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import tenpak
import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

CODECS = (
    "int4_sym_g32_fp16_v1",
    "int4_sym_g128_fp16_v1",
    "int4_g32_fp16_v1",
    "int4_g128_fp16_v1",
    "int8_sym_g32_fp16_v1",
)
TEXT = "The old house stood at the end of"


def transformers_tokens(directory: Path, count: int) -> tuple[list[int], list[int]]:
    """Tokens of the text, and those that follow."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return ids[0].tolist(), out[0][ids.shape[1] :].tolist()


def llama_tokens(path: Path, count: int) -> tuple[list[int], list[int]]:
    """Give the same by llama.cpp."""
    model = Llama(str(path), n_ctx=128, verbose=False)
    prompt = model.tokenize(TEXT.encode(), add_bos=False)
    out: list[int] = []
    model.eval(prompt)
    while len(out) < count:
        out.append(model.sample(temp=0.0, top_k=1))
        model.eval(out[-1:])
    return prompt, out


def main() -> int:
    """Print a row per codec; 1 where tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=Path(__file__).parent / "data" / "tiny-books")
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    wrong = 0
    print(f"{'codec':24} prompt  tokens that agree")
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            artifact, decoded, path = (Path(folder) / name for name in ("m.tenpak", "decoded", "m.gguf"))
            tenpak.compress(arguments.model, artifact, codec=codec, roles={"embedding": "raw_v1"})
            tenpak.decompress(artifact, decoded, dtype="F32")
            tenpak.export(artifact, path, "gguf")
            ours, theirs = transformers_tokens(decoded, arguments.tokens), llama_tokens(path, arguments.tokens)
        agree = sum(a == b for a, b in zip(ours[1], theirs[1], strict=False))
        wrong += ours != theirs
        print(f"{codec:24} {'same' if ours[0] == theirs[0] else 'differs':6}  {agree} of {len(ours[1])}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
