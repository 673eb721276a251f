"""Three ideas that tenpak does not ship, and what they are worth: rotation, SINQ's dual scaling, 2:4 sparsity.

    pip install "tenpak[eval]"
    python benches/ideas.py MODEL_DIR --text FILE [--tokens 20480] [--codec ID …]

All of them change the weights that a codec sees and undo the change behind it, so each is measured by putting the
weights that a product would effectively use into the source model. Only linear layers inside the blocks are quantized.

- *rotation* (QuaRot, SpinQuant): a random-sign Hadamard matrix R1 on the residual stream, norm gains folded first, and
  one per head between the value and the output projection, R2. Both fold into the weights of a Llama-type model. Its
  nMSE is that of the weights before the gains were folded, so only KL compares it with the others.
- *sinq*: scales of rows and columns that make their deviations equal (Müller et al., 2025), the columns' kept beside
  the codes.
- *2:4*: of every four weights of a row the two of least magnitude are zero, as sparse tensor cores want it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Sinkhorn-like passes over rows and columns.
SINQ_STEPS = 16


def main() -> int:
    """Print one row per codec and idea."""
    parser = argparse.ArgumentParser(description="what rotation, SINQ and 2:4 sparsity are worth")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument(
        "--codec",
        nargs="+",
        default=["int4_g32_fp16_v1", "int4_g128_fp16_v1", "int4_sym_g128_fp16_v1", "nf4_g64_fp16_v1"],
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import numpy as np
    import tenpak
    import torch
    from tenpak.evaluate.fidelity import Scores, fidelity
    from tenpak.evaluate.windows import cut
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    windows = cut(
        args.text, args.text.read_bytes(), AutoTokenizer.from_pretrained(args.model), model.config, args.tokens, None
    )
    linears = Linears(model)

    @torch.inference_mode()
    def logits() -> list[torch.Tensor]:
        return [model(input_ids=ids, use_cache=False).logits[:, :-1].float() for ids in windows.ids.split(8)]

    def quantize(codec: str) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weights: tenpak.encode(np.ascontiguousarray(weights, np.float32), codec).decode()

    base = logits()
    reference = Scores.empty(*windows.ids.shape)
    for i, ours in enumerate(base):
        reference.put(8 * i, ours, ours, windows.ids[8 * i :][:8, 1:])
    print(f"{'codec':<24}{'idea':<10}{'nMSE':>10}{'KL':>12}{'±':>10}{'top-1':>8}{'PPL':>9}")
    for codec in args.codec:
        for idea, change in IDEAS.items():
            lost = total = 0.0
            changed = {}
            for name, weights in linears.weights.items():
                changed[name] = change(linears, name, weights, quantize(codec))
                lost += float(np.square(changed[name] - weights, dtype=np.float64).sum())
                total += float(np.square(weights, dtype=np.float64).sum())
            linears.put(changed)
            scores = Scores.empty(*windows.ids.shape)
            for i, (ours, theirs) in enumerate(zip(base, logits(), strict=True)):
                scores.put(8 * i, ours, theirs, windows.ids[8 * i :][:8, 1:])
            f = fidelity(scores, reference.nll)
            print(
                f"{codec:<24}{idea:<10}{lost / total:>10.3e}{f.kld:>12.4e}{f.kld_error or 0:>10.1e}{f.top1:>8.4f}"
                f"{f.ppl:>9.4f}",
                flush=True,
            )
            linears.put(linears.weights)
    return 0


class Linears:
    """The linear layers of the blocks of a Llama-type model, with what their rotation needs."""

    def __init__(self, model: Any) -> None:
        """Take the weights out as float32 arrays ``[out, in]``."""
        self.model = model
        self.weights = {
            name: module.weight.detach().numpy().copy()
            for name, module in model.named_modules()
            if type(module).__name__ == "Linear" and ".layers." in name
        }
        self.head = model.config.head_dim
        self.seed = 1

    def put(self, weights: dict[str, Any]) -> None:
        """Put weights into the model."""
        import torch

        for name, array in weights.items():
            self.model.get_submodule(name).weight.data = torch.from_numpy(array)

    def gain(self, name: str) -> Any:
        """Return the gain of the norm before a layer; ones where there is none, ``[in]``."""
        import numpy as np

        layer, part, own = name.rsplit(".", 2)
        norm = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}[part]
        if own in ("o_proj", "down_proj"):
            return np.ones(self.weights[name].shape[1], np.float32)
        return self.model.get_submodule(f"{layer}.{norm}").weight.detach().numpy()


def plain(_: Linears, __: str, weights: Any, quantize: Any) -> Any:
    """Quantize by the codec alone."""
    return quantize(weights)


def hadamard(size: int, seed: int) -> Any:
    """Return a Hadamard matrix of a power of two with random signs, orthogonal."""
    import numpy as np

    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    if len(matrix) != size:
        raise SystemExit(f"rotation needs widths that are powers of two, found {size}")
    return matrix * np.random.default_rng(seed).choice([-1.0, 1.0], size) / np.sqrt(size)


def rotation(linears: Linears, name: str, weights: Any, quantize: Any) -> Any:
    """Put R1 on the side of the residual stream, R2 on that of the heads."""
    import numpy as np

    own, head = name.rsplit(".", 1)[1], hadamard(linears.head, 2)
    gain = linears.gain(name)
    left, right = np.eye(weights.shape[0]), np.eye(weights.shape[1])
    if own in ("o_proj", "down_proj"):
        left = hadamard(weights.shape[0], linears.seed)
    else:
        right = hadamard(weights.shape[1], linears.seed)
    if own == "v_proj":
        left = np.kron(np.eye(weights.shape[0] // linears.head), head)
    if own == "o_proj":
        right = np.kron(np.eye(weights.shape[1] // linears.head), head)
    rotated = quantize(left @ (weights * gain) @ right.T)
    return ((left.T @ rotated @ right) / gain).astype(np.float32)


def sinq(_: Linears, __: str, weights: Any, quantize: Any) -> Any:
    """Scale rows and columns to equal deviation; take the scales of least imbalance over the passes."""
    import numpy as np

    w = weights.astype(np.float64)
    rows, cols = np.ones((len(w), 1)), np.ones((1, w.shape[1]))
    best, kept = np.inf, (rows, cols)
    for _ in range(SINQ_STEPS):
        now = w / rows / cols
        of_rows, of_cols = now.std(1, keepdims=True), now.std(0, keepdims=True)
        imbalance = max(of_rows.max(), of_cols.max()) / min(of_rows.min(), of_cols.min())
        if imbalance < best:
            best, kept = imbalance, (rows, cols)
        rows, cols = rows * np.sqrt(of_rows), cols * np.sqrt(of_cols)
    rows, cols = kept
    return (quantize(w / rows / cols) * rows * cols).astype(np.float32)


def two_of_four(_: Linears, __: str, weights: Any, quantize: Any) -> Any:
    """Quantize the two largest of every four and make the others zero."""
    import numpy as np

    fours = np.abs(weights).reshape(len(weights), -1, 4)
    kept = fours.argsort(2).argsort(2) >= 2
    kept = kept.reshape(weights.shape)
    return np.where(kept, quantize(np.where(kept, weights, 0)), 0).astype(np.float32)


IDEAS = {"plain": plain, "rotation": rotation, "sinq": sinq, "2:4": two_of_four}

if __name__ == "__main__":
    sys.exit(main())
