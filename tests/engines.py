"""Engines on exported files, against transformers on the decoded weights: what takes long, so only on request.

``python tests/engines.py [MODEL_DIR]`` has llama.cpp continue a text from each codec that GGUF holds, token for token,
and compares logits of a random model of every family. It needs ``pip install llama-cpp-python``, which compiles
llama.cpp for minutes. llama.cpp rounds activations to 8 bits, so logits agree to some hundredths.

``python tests/engines.py --compressed-tensors 0.15.0 0.17.0`` has transformers load what is exported with each of these
versions of compressed-tensors, installed into an environment of its own beside everything else that is here.

``python tests/engines.py --gptqmodel`` has GPTQModel (``pip install gptqmodel``) load what is exported to GPTQ and AWQ,
every matrix exactly, and quantize the model itself, which is then taken over exactly.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tenpak
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
CODECS = (
    "int4_sym_g32_fp16_v1",
    "int4_sym_g128_fp16_v1",
    "int4_g32_fp16_v1",
    "int4_g128_fp16_v1",
    "int8_sym_g32_fp16_v1",
)
#: What every version of compressed-tensors reads; some fail to load zero points.
SYMMETRIC = ("int4_sym_g32_fp16_v1", "int4_sym_g128_fp16_v1", "int8_sym_g32_fp16_v1", "int8_sym_v1")
#: What GPTQModel loads.
GPTQMODEL = (
    ("gptq", "int4_sym_g32_fp16_v1"),
    ("gptq", "int4_sym_g128_fp16_v1"),
    ("gptq", "int4_zp_g32_fp16_v1"),
    ("gptq", "int8_sym_g32_fp16_v1"),
    ("awq", "int4_zp_g32_fp16_v1"),
    ("awq", "int4_sym_g128_fp16_v1"),
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
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=128, verbose=False)
    prompt = model.tokenize(TEXT.encode(), add_bos=False)
    out: list[int] = []
    model.eval(prompt)
    while len(out) < count:
        out.append(model.sample(temp=0.0, top_k=1))
        model.eval(out[-1:])
    return prompt, out


def codecs(model: Path, count: int) -> int:
    """Print a row per codec and return how many give other tokens."""
    wrong = 0
    print(f"{'codec':24} prompt  tokens that agree")
    for codec in CODECS:
        with tempfile.TemporaryDirectory() as folder:
            artifact, decoded, path = (Path(folder) / name for name in ("m.tenpak", "decoded", "m.gguf"))
            tenpak.compress(model, artifact, codec=codec, roles={"embedding": "raw_v1"})
            tenpak.decompress(artifact, decoded, dtype="F32")
            tenpak.export(artifact, path, "gguf")
            ours, theirs = transformers_tokens(decoded, count), llama_tokens(path, count)
        agree = sum(a == b for a, b in zip(ours[1], theirs[1], strict=False))
        wrong += ours != theirs
        print(f"{codec:24} {'same' if ours[0] == theirs[0] else 'differs':6}  {agree} of {len(ours[1])}", flush=True)
    return wrong


def families() -> int:
    """Print a row per family and return how many give other logits."""
    sys.path.insert(0, str(HERE / "python"))
    from llama_cpp import Llama
    from test_families import IN_GGUF, Made

    wrong, ids = 0, list(range(2, 30))
    print(f"\n{'family':12} relative difference of logits, same first choice")
    for kind in IN_GGUF:
        with tempfile.TemporaryDirectory() as folder:
            made = Made(Path(folder), kind)
            want = logits(made.decoded(), ids)
            engine = Llama(str(made.gguf()), n_ctx=64, logits_all=True, verbose=False)
            engine.eval(ids)
            got = np.array(engine.scores[: len(ids)])
        difference = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        wrong += difference > 0.1
        print(f"{kind:12} {difference:.4f}  {(got.argmax(1) == want.argmax(1)).mean():.2f}", flush=True)
    return wrong


def logits(directory: Path, ids: list[int]) -> np.ndarray:
    """Logits of a directory in float32, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        found: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return found


def compressed_tensors(model: Path) -> int:
    """Print a row per codec, as the compressed-tensors that is installed has it; return how many are wrong."""
    import compressed_tensors

    wrong = 0
    for codec in SYMMETRIC:
        with tempfile.TemporaryDirectory() as folder:
            artifact, decoded, out = (Path(folder) / name for name in ("m.tenpak", "decoded", "out"))
            tenpak.compress(model, artifact, codec=codec, roles={"embedding": "raw_v1"})
            tenpak.decompress(artifact, decoded, dtype="F32")
            tenpak.export(artifact, out, "compressed-tensors")
            ids = list(range(2, 90))
            difference = float(np.abs(logits(out, ids) - logits(decoded, ids)).max())
        wrong += difference != 0
        print(f"{compressed_tensors.__version__:8} {codec:24} largest difference {difference}", flush=True)
    return wrong


def gptqmodel(model: Path) -> int:
    """Print a row per export and one for GPTQModel's own quantizing; return how many differ."""
    from tenpak import methods

    wrong = 0
    for way, codec in GPTQMODEL:
        with tempfile.TemporaryDirectory() as folder:
            out, artifact = Path(folder) / "out", Path(folder) / "m.tenpak"
            tenpak.export(model, out, way, codec=codec)
            tenpak.compress(out, artifact)
            count, difference = against_gptqmodel(out, way, artifact)
        wrong += difference != 0 or count == 0
        print(f"{way:4} {codec:24} {count} matrices, largest difference {difference}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text, artifact = Path(folder) / "text", Path(folder) / "m.tenpak"
        text.write_text(" ".join([TEXT] * 400))
        methods.run("gptqmodel", model, artifact, group=32, text=text, samples=8, length=64)
        opened = tenpak.open(artifact)
        own = [name for name in opened if name.endswith("_proj.weight")]
        exact = [name for name in own if opened[name].codec == "int4_sym_g32_fp16_v1"]
    wrong += not own or exact != own
    print(f"its own quantizing, group 32: {len(exact)} of {len(own)} matrices are taken over as they are", flush=True)
    return wrong


def against_gptqmodel(directory: Path, way: str, artifact: Path) -> tuple[int, float]:
    """Count the matrices that GPTQModel loads, and give their largest difference from the artifact's in F16."""
    from gptqmodel import BACKEND, GPTQModel

    backend = BACKEND.TORCH_AWQ if way == "awq" else BACKEND.TORCH
    loaded = GPTQModel.load(str(directory), backend=backend, device="cpu", dtype=torch.float16)
    opened, count, worst = tenpak.open(artifact), 0, 0.0
    for name, module in loaded.model.named_modules():
        if hasattr(module, "qweight"):
            identity = torch.eye(module.in_features, dtype=torch.float16)
            with torch.no_grad():
                weights = module(identity).T if way == "awq" else module.dequantize_weight().T
            wanted = torch.tensor(opened.decode(f"{name}.weight").astype(np.float16))
            worst, count = max(worst, float((weights.float() - wanted.float()).abs().max())), count + 1
    return count, worst


def at_version(version: str, arguments: list[str]) -> int:
    """Run this program with another version of compressed-tensors, and everything else as it is here."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        done = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        package = f"compressed-tensors=={version}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", package], check=True)
        # Behind its own packages come those that are here.
        places = "\n".join(place for place in sys.path if "site-packages" in place and Path(place).is_dir())
        Path(done.stdout.strip(), "here.pth").write_text(places + "\n")
        return subprocess.run([python, __file__, *arguments], check=False, env=os.environ).returncode


def main() -> int:
    """Print what engines make of exports; 1 where it is something else."""
    parser = argparse.ArgumentParser(description="engines on exported files")
    parser.add_argument("model", type=Path, nargs="?", default=HERE / "data" / "tiny-books")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--compressed-tensors", nargs="*", metavar="VERSION", help="none for the one that is installed")
    parser.add_argument("--gptqmodel", action="store_true", help="GPTQModel on exports, and its own quantizing")
    arguments = parser.parse_args()
    if arguments.gptqmodel:
        return int(gptqmodel(arguments.model) > 0)
    if arguments.compressed_tensors is None:
        checks: list[Callable[[], int]] = [lambda: codecs(arguments.model, arguments.tokens), families]
        return int(sum(check() for check in checks) > 0)
    if not arguments.compressed_tensors:
        return int(compressed_tensors(arguments.model) > 0)
    again = [str(arguments.model), "--compressed-tensors"]
    return int(any([at_version(version, again) for version in arguments.compressed_tensors]))


if __name__ == "__main__":
    sys.exit(main())
