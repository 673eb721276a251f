"""A whole 1B-shaped model, end to end, beside llama.cpp: tokens a second for a prompt and for decoding.

    pip install llama-cpp-python gguf "tenpak[hf]"
    python benches/end_to_end.py [--layers 16] [--prompt 512] [--decode 64] [--threads T]

The model is synthetic: the shape of Llama 3.2 1B (width 2048, MLP 8192, 32/8 heads, 16 layers) with a vocabulary of
32,000 and random weights, which speed does not depend on. llama.cpp runs it through llama-cpp-python as Q4_0 and as
Q4_1 with the embedding, which is also the head, in Q8_0; tenpak runs the same shapes inside transformers' Llama, as
`int4_sym_g32_fp16_v1` (what Q4_0 stores) and `int4_g32_fp16_v1` (what Q4_1 stores) with the embedding in
`int8_sym_g32_fp16_v1` (Q8_0). llama.cpp always rounds activations to 8 bits; tenpak does so as `int8`, and its
`float32` and `bfloat16` rows do not. The two take turns, and the best of each counts.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

WIDTH, MLP, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32_000
PAIRS = {"Q4_0": "int4_sym_g32_fp16_v1", "Q4_1": "int4_g32_fp16_v1"}
HEAD_CODEC = "int8_sym_g32_fp16_v1"


def write_gguf(path: Path, kind: str, layers: int) -> None:
    """Write the model as llama.cpp reads it, without a tokenizer."""
    import gguf
    import numpy as np

    head = WIDTH // HEADS
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(VOCABULARY)

    def add(name: str, rows: int, cols: int, dtype: gguf.GGMLQuantizationType) -> None:
        weights = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.02)
        writer.add_tensor(name, gguf.quants.quantize(weights, dtype), raw_dtype=dtype)

    quantized = gguf.GGMLQuantizationType[kind]
    add("token_embd.weight", VOCABULARY, WIDTH, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(WIDTH, np.float32))
        for name, (rows, cols) in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (KV_HEADS * head, WIDTH),
            "attn_v": (KV_HEADS * head, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (MLP, WIDTH),
            "ffn_up": (MLP, WIDTH),
            "ffn_down": (WIDTH, MLP),
        }.items():
            add(f"blk.{i}.{name}.weight", rows, cols, quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """The model in llama.cpp."""

    def __init__(self, path: Path, threads: int, context: int) -> None:
        """Load the model at `path`."""
        from llama_cpp import Llama

        self._llama = Llama(
            str(path), n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False
        )

    def prompt(self, tokens: list[int]) -> None:
        """Forget everything and read a prompt."""
        self._llama.reset()
        self._llama.eval(tokens)

    def decode(self, count: int) -> None:
        """Read `count` more tokens one at a time."""
        for i in range(count):
            self._llama.eval([i + 5])


class Tenpak:
    """The model in transformers, with tenpak's layers."""

    def __init__(self, codec: str, layers: int) -> None:
        """Make a model of random weights and quantize it layer by layer, as it is made."""
        import torch
        from tenpak.torch import quantize_model
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            num_hidden_layers=layers,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
        )
        torch.manual_seed(0)
        self._model = LlamaForCausalLM(config).eval()
        recipe = f'codec = "{codec}"\n[roles]\nembedding = "{HEAD_CODEC}"\nhead = "{HEAD_CODEC}"\n'
        quantize_model(self._model, recipe=recipe)
        self._cache = None

    def act(self, act: str) -> None:
        """Choose the arithmetic of every quantized layer."""
        import torch
        from tenpak.torch import set_act

        set_act(self._model, act)
        self._model.to(torch.bfloat16 if act == "bfloat16" else torch.float32)

    def prompt(self, tokens: list[int]) -> None:
        """Forget everything and read a prompt."""
        self._cache = None
        self._step(tokens)

    def decode(self, count: int) -> None:
        """Read `count` more tokens one at a time."""
        for i in range(count):
            self._step([i + 5])

    def _step(self, tokens: list[int]) -> None:
        import torch

        with torch.inference_mode():
            out = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values


def rates(model: LlamaCpp | Tenpak, prompt: int, decode: int) -> tuple[float, float]:
    """Return tokens a second for the prompt and for decoding."""
    tokens = [3 + i % 1000 for i in range(prompt)]
    start = time.perf_counter()
    model.prompt(tokens)
    middle = time.perf_counter()
    model.decode(decode)
    return prompt / (middle - start), decode / (time.perf_counter() - middle)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="a 1B-shaped model end to end, beside llama.cpp")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    print(f"{args.layers} layers, prompt {args.prompt}, decode {args.decode}, threads {args.threads}")
    print(f"{'engine':<34}{'activations':<13}{'prompt t/s':>11}{'decode t/s':>11}{'x llama.cpp':>16}")
    for kind, codec in PAIRS.items():
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "model.gguf")
            write_gguf(path, kind, args.layers)
            theirs = LlamaCpp(path, args.threads, args.prompt + args.decode + 8)
        mine = Tenpak(codec, args.layers)
        best: dict[str, tuple[float, float]] = {}
        for _ in range(args.rounds):
            for name in ("llama.cpp", "int8", "bfloat16", "float32"):
                model: LlamaCpp | Tenpak = theirs
                if name != "llama.cpp":
                    mine.act(name)
                    model = mine
                measured = rates(model, args.prompt, args.decode)
                before = best.get(name, (0.0, 0.0))
                best[name] = max(before[0], measured[0]), max(before[1], measured[1])
        for name, (prompt, decode) in best.items():
            engine, act = (f"llama.cpp {kind}", "int8") if name == "llama.cpp" else (f"tenpak {codec}", name)
            shares = f"{prompt / best['llama.cpp'][0]:7.2f} {decode / best['llama.cpp'][1]:7.2f}"
            print(f"{engine:<34}{act:<13}{prompt:11.1f}{decode:11.1f}{shares:>16}", flush=True)
        del mine, theirs


if __name__ == "__main__":
    main()
