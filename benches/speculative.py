"""Speculative decoding by low-bit copies of a model: how many drafted tokens are accepted, and tokens a second.

    pip install "tenpak[torch,hf]"
    python benches/speculative.py MODEL_DIR --text TEXT.txt [--prompts 8] [--new 64] [--draft-tokens 5] [--threads T]

Each row is a draft: a codec of a fixed size, or ``ecu_v1`` at a rate, which in memory takes 8 bits. Prompts are 32
tokens each, evenly from the text. ``accepted`` is accepted tokens over drafted ones, ``tokens/pass`` new tokens per
forward pass of the model, and ``x plain`` the speed against the model's own greedy decoding, with which every draft
takes turns; the best of ``--repeat`` runs counts. ``same`` says how many prompts got the tokens of greedy decoding, to
the last one. ``--counts`` leaves speeds out, which mean something on an idle machine and with a release build only.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tenpak
import torch
from tenpak.speculative import Generated, Speculative
from transformers import AutoModelForCausalLM, AutoTokenizer

DRAFTS: dict[str, dict[str, Any]] = {
    "ecu_v1 at 2": {"target_bits": 2},
    "ecu_v1 at 3": {"target_bits": 3},
    "ecu_v1 at 4": {"target_bits": 4},
    "ecu_v1 at 5": {"target_bits": 5},
    "int4_g128_fp16_v1": {"codec": "int4_g128_fp16_v1"},
    "int4_g32_fp16_v1": {"codec": "int4_g32_fp16_v1"},
    "int8_sym_v1": {"codec": "int8_sym_v1"},
}


def main() -> int:
    """Print a row per draft."""
    parser = argparse.ArgumentParser(description="acceptance and speed of drafts by low-bit copies of a model")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that prompts are taken from")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=64, help="tokens behind each prompt")
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--counts", action="store_true", help="print no speeds")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(encoding="utf-8")[: 1 << 20])["input_ids"]
    step = (len(ids) - 32) // args.prompts
    prompts = [ids[i * step : i * step + 32] for i in range(args.prompts)]
    options = {"max_new_tokens": args.new, "eos_token_id": None, "pad_token_id": 0}
    print(f"{args.model.name} on {args.text.name}: {args.prompts} prompts, {args.new} tokens each, ", end="")
    print(f"{args.draft_tokens} drafted at a time, {torch.get_num_threads()} threads\n")
    speeds = "" if args.counts else f"{'tokens/s':>8} {'plain':>8} {'x plain':>7}  "
    print(f"{'draft':20} {'accepted':>8} {'tokens/pass':>11}  {speeds}same")

    def plain(prompt: list[int]) -> torch.Tensor:
        tokens = torch.tensor([prompt])
        found: torch.Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, **options)
        return found

    for name, how in DRAFTS.items():
        with tempfile.TemporaryDirectory() as folder:
            tenpak.compress(args.model, Path(folder) / "d.tenpak", **how)
            pair = Speculative(model, Path(folder) / "d.tenpak", draft_tokens=args.draft_tokens)
            times, best = [float("inf"), float("inf")], []
            for _ in range(1 if args.counts else args.repeat):
                start = time.perf_counter()
                best = [pair.generate(prompt, **options) for prompt in prompts]
                middle = time.perf_counter()
                own = [plain(prompt) for prompt in prompts]
                times = [min(times[0], middle - start), min(times[1], time.perf_counter() - middle)]
        print_row(name, best, own, None if args.counts else times)
    return 0


def print_row(name: str, runs: list[Generated], own: list[torch.Tensor], times: list[float] | None) -> None:
    """Print what a draft came to."""
    new = sum(run.new for run in runs)
    accepted = sum(run.accepted for run in runs) / max(1, sum(run.drafted for run in runs))
    same = sum(torch.equal(run.tokens, tokens) for run, tokens in zip(runs, own, strict=True))
    passes, speeds = new / sum(run.rounds for run in runs), ""
    if times is not None:
        speeds = f"{new / times[0]:8.1f} {new / times[1]:8.1f} {times[1] / times[0]:7.2f}  "
    print(f"{name:20} {accepted:8.3f} {passes:11.2f}  {speeds}{same} of {len(runs)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
