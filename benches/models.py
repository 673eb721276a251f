"""A real model, loaded from its artifact: the same text as from the decoded weights, memory, and tokens a second.

    pip install "tenpak[hf]"
    python benches/models.py MODEL_DIR [--codec ID] [--tokens 100] [--threads T]

Four models generate the same greedy continuation: the checkpoint in float32 and in bfloat16, the artifact's decoded
weights in float32, and the artifact itself, multiplied without decoding, in each arithmetic. Decoded and packed weights
in float32 must give the same tokens, or the command fails.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "Once upon a time there was"


def main() -> int:
    """Print the table; 1 when packed and decoded weights generate different tokens."""
    parser = argparse.ArgumentParser(description="a real model from its artifact: text, memory, tokens a second")
    parser.add_argument("model", type=Path)
    parser.add_argument("--codec", default="int4_g32_fp16_v1")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import tenpak
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    prompt = AutoTokenizer.from_pretrained(args.model)(PROMPT, return_tensors="pt").input_ids
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        artifact, decoded = Path(directory, "model.tenpak"), Path(directory, "decoded")
        tenpak.compress(args.model, artifact, codec=args.codec)
        tenpak.decompress(artifact, decoded, dtype="float32")
        for name, path, dtype in (
            ("checkpoint float32", args.model, torch.float32),
            ("checkpoint bfloat16", args.model, torch.bfloat16),
            ("decoded float32", decoded, torch.float32),
        ):
            rows.append((name, AutoModelForCausalLM.from_pretrained(path, dtype=dtype)))
        for act, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("int8", torch.float32)):
            rows.append((f"packed {act}", tenpak.from_pretrained(artifact, dtype=dtype, act=act)))
    texts, best = {}, {}
    for _ in range(args.rounds):
        for name, model in rows:
            start = time.perf_counter()
            texts[name] = model.generate(
                prompt, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0
            )[0, prompt.shape[1] :].tolist()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    print(f"{args.model.name}, {args.codec}, {args.tokens} tokens, {args.threads} threads")
    print(f"{'weights':<22}{'bytes in memory':>16}{'x float32':>11}{'tokens/s':>10}  same tokens as decoded")
    sizes = {name: memory(model) for name, model in rows}
    reference = texts["decoded float32"]
    for name, _ in rows:
        same = next((i for i, (a, b) in enumerate(zip(texts[name], reference, strict=True)) if a != b), args.tokens)
        print(
            f"{name:<22}{sizes[name]:>16,}{sizes['checkpoint float32'] / sizes[name]:>11.2f}"
            f"{args.tokens / best[name]:>10.1f}  {same} of {args.tokens}"
        )
    return 0 if texts["packed float32"] == reference else 1


def memory(model) -> int:
    """Return the bytes of parameters and buffers, shared ones once."""
    held = {t.untyped_storage().data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


if __name__ == "__main__":
    sys.exit(main())
