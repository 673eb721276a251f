"""A whole `tenpak compress` of a large checkpoint: GB/s of source and peak memory, beside a copy of the same file.

    python benches/compress.py [--gb 2] [--dir DIR] [--tenpak target/release/tenpak] [--codec ID ...]

Writes a synthetic checkpoint (normal weights in matrices of 8192 x 4096, the same rows over and over) once per dtype,
which leaves it in the page cache, and runs each codec in a process of its own, twice, the better run counting. The copy
reads and writes the file in the same directory without fsync; `compress` includes its fsync.
"""

import argparse
import json
import os
import resource
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

ROWS, COLS, PARTS = 8192, 4096, 64


def synthesize(path: Path, dtype: str, size: int) -> None:
    """Write a checkpoint of about `size` bytes."""
    # Few rows at a time: what this process has in memory would be counted as its children's.
    weights = np.random.default_rng(0).standard_normal((ROWS // PARTS, COLS), dtype=np.float32) * np.float32(0.02)
    part = weights.tobytes() if dtype == "F32" else (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    tensor = len(part) * PARTS
    count = max(1, size // tensor)
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": dtype,
            "shape": [ROWS, COLS],
            "data_offsets": [i * tensor, (i + 1) * tensor],
        }
        for i in range(count)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(count * PARTS):
            file.write(part)


def run(command: list[str]) -> tuple[float, float]:
    """Run a command; return seconds and the peak memory in MB of the largest child so far."""
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--dir", type=Path, default=None)
    parser.add_argument("--tenpak", default="target/release/tenpak")
    parser.add_argument("--dtype", nargs="+", default=["F32", "BF16"])
    parser.add_argument("--codec", nargs="+", default=["int4_g8_fp16_v1", "int4_g32_fp16_v1", "int8_sym_v1", "raw_v1"])
    parser.add_argument("--extra", nargs="*", default=[], help="more arguments of compress")
    arguments = parser.parse_args()
    print(f"{'dtype':6} {'codec':20} {'seconds':>8} {'GB/s':>6} {'peak MB':>8} {'copy GB/s':>10}")
    with tempfile.TemporaryDirectory(dir=arguments.dir) as directory:
        source, target, copy = (Path(directory, name) for name in ("m.safetensors", "m.tenpak", "copy"))
        for dtype in arguments.dtype:
            synthesize(source, dtype, int(arguments.gb * 1e9))
            size = source.stat().st_size
            os.sync()
            copied, _ = run(["cp", "--reflink=never", str(source), str(copy)])
            copy.unlink()
            for codec in arguments.codec:
                command = [arguments.tenpak, "compress", str(source), "-o", str(target), "--codec", codec, "-q"]
                seconds, peak = min(run([*command, "--force", *arguments.extra]) for _ in range(2))
                target.unlink()
                rate, copy_rate = size / 1e9 / seconds, size / 1e9 / copied
                print(f"{dtype:6} {codec:20} {seconds:8.2f} {rate:6.2f} {peak:8.0f} {copy_rate:10.2f}", flush=True)


if __name__ == "__main__":
    main()
