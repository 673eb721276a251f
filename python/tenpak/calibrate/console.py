"""`tenpak calibrate`: the arguments, one call, what was written."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from .._console import Bar, guarded, tokens
from . import DEFAULT_MEMORY_BYTES, DEFAULT_TOKENS, Summary, calibrate

SUMMARY = "Gather statistics of what flows into a model's linear layers, for `tenpak compress --stats`"


def run(arguments: Sequence[str]) -> int:
    """Run ``tenpak calibrate`` and return its exit code: 0 done, 2 could not run, 130 and 143 stopped by a signal."""
    return guarded(lambda: _calibrate(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenpak calibrate",
        description=f"{SUMMARY}. Never calibrate on a text that the result is scored on.",
        epilog="exit codes: 0 done, 2 could not run, 130/143 stopped by a signal; --resume goes on after one",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face directory of the model")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to run, like what the model will read")
    add("--output", "-o", metavar="FILE", type=Path, required=True, help="statistics file to write (safetensors)")
    add("--full", action="store_true", help="also second moments, which --fit gptq needs: inputs² numbers per layer")
    add("--fisher", action="store_true", help="also squared gradients, which take a backward pass")
    add(
        "--tokens",
        metavar="N",
        type=tokens,
        default=DEFAULT_TOKENS,
        help=f"tokens to use, from the first, or 'all' [default: {DEFAULT_TOKENS}]",
    )
    add("--context", metavar="N", type=int, help="tokens of a window [default: the model's context]")
    add("--window-batch", metavar="N", type=int, default=0, help="windows per forward pass; 0 to choose [default: 0]")
    add(
        "--memory-bytes",
        metavar="N",
        type=int,
        default=DEFAULT_MEMORY_BYTES,
        help="most bytes of sums in memory; above, the text is run once more for the layers that are left "
        f"[default: {DEFAULT_MEMORY_BYTES}]",
    )
    add("--resume", action="store_true", help="go on where an interrupted run of the same arguments stopped")
    add("--force", action="store_true", help="replace an existing output, or start an interrupted run anew")
    add("--threads", metavar="N", type=int, default=0, help="threads; 0 for the libraries' own choice [default: 0]")
    add("--format", choices=("text", "json"), default="text", help="how to print the result [default: text]")
    add("--quiet", "-q", action="store_true", help="no progress bar and no result, only errors")
    return parser


def _calibrate(options: argparse.Namespace) -> int:
    with Bar(hidden=options.quiet) as bar:
        summary = calibrate(
            options.model,
            options.text,
            options.output,
            tokens=options.tokens,
            context=options.context,
            window_batch=options.window_batch,
            full=options.full,
            fisher=options.fisher,
            memory_bytes=options.memory_bytes,
            resume=options.resume,
            force=options.force,
            threads=options.threads,
            progress=bar.step,
        )
    if not options.quiet:
        print(_json(summary) if options.format == "json" else _text(summary), flush=True)
    return 0


def _json(summary: Summary) -> str:
    report = {"schema": "tenpak.calibrate/1", **dataclasses.asdict(summary)}
    return json.dumps(report, indent=2, ensure_ascii=False)


def _text(summary: Summary) -> str:
    lines = [
        f"wrote {summary.output}: {summary.bytes:,} bytes, {summary.linears} linear layers, "
        f"{summary.tokens:,} tokens in {summary.windows:,} windows of {summary.context:,}"
    ]
    if summary.passes > 1:
        lines.append(f"{summary.passes} passes over the text, because the sums of all layers exceed --memory-bytes")
    if summary.resumed:
        lines.append(f"resumed after {summary.resumed:,} windows")
    lines += [f"note: {what}: no statistics" for what in summary.skipped]
    return "\n".join(lines)
