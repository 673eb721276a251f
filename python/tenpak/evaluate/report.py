"""What an evaluation found: typed, as the JSON of ``src/cli/schema.json``, and as text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Report = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How large weights are, against 32 and 16 bits.

    Attributes
    ----------
    weights
        Number of weights.
    bytes
        Bytes that they take.
    """

    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average."""
        return 8 * self.bytes / max(1, self.weights)

    @property
    def x_vs_fp32(self) -> float:
        """How many times smaller than in FP32."""
        return 4 * self.weights / max(1, self.bytes)

    @property
    def x_vs_16bit(self) -> float:
        """How many times smaller than in FP16 or BF16."""
        return 2 * self.weights / max(1, self.bytes)

    def to_json(self) -> Report:
        """Return the object ``sizes`` of the schema."""
        return {
            "weights": self.weights,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "x_vs_fp32": self.x_vs_fp32,
            "x_vs_16bit": self.x_vs_16bit,
        }


@dataclass(frozen=True)
class Fidelity:
    """How far a model's predictions are from those of the source model.

    Attributes
    ----------
    kld
        Mean over the scored tokens of the Kullback-Leibler divergence KL(source ‖ model) of the next token, in nats.
    kld_error
        Standard error of ``kld``, the windows being the clusters; None for a single window.
    kld_p99, kld_p999, kld_max
        99 % and 99.9 % quantiles over tokens (linear between neighbours) and the largest value, in nats.
    top1, top1_error
        Fraction of tokens whose most likely next token is the source model's, and its standard error.
    ppl, ppl_error
        Perplexity: the exponential of the mean negative log-likelihood, and its standard error.
    ppl_ratio, ppl_ratio_error
        Perplexity over that of the source model, and its standard error from the paired differences of the
        log-likelihood of each window.
    """

    kld: float
    kld_error: float | None
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1: float
    top1_error: float | None
    ppl: float
    ppl_error: float | None
    ppl_ratio: float
    ppl_ratio_error: float | None


@dataclass(frozen=True)
class Row:
    """One quantized model.

    Attributes
    ----------
    name
        Codec id, file name of the artifact, or file name of the recipe.
    kind
        ``codec``, ``recipe`` or ``artifact``.
    codecs
        Number of quantized tensors by codec id.
    matrices
        Size of the planes of the quantized tensors; None where nothing is quantized.
    file
        Size of the whole artifact, header counted, settings and tokenizer that it carries along not.
    overhead_bytes
        Those of its bytes that belong to no tensor: header, checksums, padding.
    nmse
        Squared error over squared weights, summed over all quantized tensors; None where nothing is quantized.
    fidelity
        How far its predictions are from the source model's.
    memory_bytes
        Bytes of parameters and buffers of the model that ran.
    encode_seconds
        Time to make the artifact; None for one that was given.
    load_seconds, score_seconds
        Time to build the model from the artifact, and to run and compare it.
    notes
        What the compressor changed, such as codecs that gave way to others.
    """

    name: str
    kind: str
    codecs: Mapping[str, int]
    matrices: Sizes | None
    file: Sizes
    overhead_bytes: int
    nmse: float | None
    fidelity: Fidelity
    memory_bytes: int
    encode_seconds: float | None
    load_seconds: float
    score_seconds: float
    notes: Sequence[str] = ()

    def to_json(self) -> Report:
        """Return the object ``eval_row`` of the schema."""
        return {
            "name": self.name,
            "kind": self.kind,
            "codecs": [{"codec": codec, "tensors": tensors} for codec, tensors in self.codecs.items()],
            "matrices": None if self.matrices is None else self.matrices.to_json(),
            "file": self.file.to_json(),
            "overhead_bytes": self.overhead_bytes,
            "nmse": self.nmse,
            **dataclasses.asdict(self.fidelity),
            "memory_bytes": self.memory_bytes,
            "encode_seconds": self.encode_seconds,
            "load_seconds": self.load_seconds,
            "score_seconds": self.score_seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Baseline:
    """The source model.

    Attributes
    ----------
    size
        Size of the checkpoint's files.
    ppl, ppl_error
        Perplexity and its standard error.
    noise_floor
        Largest KL divergence, in nats, of the model with itself: the first batch run twice through the same path.
    memory_bytes
        Bytes of its parameters and buffers.
    load_seconds, score_seconds
        Time to load and to run it.
    """

    size: Sizes
    ppl: float
    ppl_error: float | None
    noise_floor: float
    memory_bytes: int
    load_seconds: float
    score_seconds: float

    def to_json(self) -> Report:
        """Return the object ``eval_baseline`` of the schema."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**plain, "size": self.size.to_json()}


@dataclass(frozen=True)
class Evaluation:
    """A table of quantized models, all measured on the same tokens in the same way.

    Attributes
    ----------
    model, text
        Paths, as they were given.
    text_sha256
        SHA-256 of the text, in hex.
    text_tokens
        Tokens of the whole text.
    context, windows
        Tokens of a window and number of windows; ``context * windows`` tokens were run.
    scored
        Tokens that count: all but the first of each window.
    vocabulary
        Logits per token.
    dtype
        Dtype of the forward pass; measures are float64 from float32 logits.
    compute
        How the quantized matrices were multiplied: ``decoded`` to the forward pass's dtype first, or as they are stored
        in the arithmetic ``float32``, ``bfloat16`` or ``int8``.
    threads, window_batch
        Threads of PyTorch and windows per forward pass.
    base_logits
        ``kept`` in a temporary file, or ``recomputed`` for each row.
    base_logits_bytes
        What they take, or would.
    baseline
        The source model.
    rows
        The quantized ones, in the order asked for.
    """

    model: str
    text: str
    text_sha256: str
    text_tokens: int
    context: int
    windows: int
    scored: int
    vocabulary: int
    dtype: str
    compute: str
    threads: int
    window_batch: int
    base_logits: str
    base_logits_bytes: int
    baseline: Baseline
    rows: Sequence[Row]

    def to_json(self) -> Report:
        """Return the report ``tenpak.eval/1`` of the schema."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "schema": "tenpak.eval/1",
            **plain,
            "baseline": self.baseline.to_json(),
            "rows": [row.to_json() for row in self.rows],
        }

    def to_text(self) -> str:
        """Return the report as lines of text: the protocol, one table, and what each row quantizes."""
        base = self.baseline
        how = "weights decoded" if self.compute == "decoded" else f"weights packed, products in {self.compute}"
        floor = "exactly 0" if base.noise_floor == 0 else f"up to {_scientific(base.noise_floor, 1)} nats"
        lines = [
            f"{self.model} on {self.text}: {self.windows:,} windows of {self.context:,} tokens, {self.scored:,} tokens "
            f"scored (the first of a window is not), {self.dtype}",
            f"base logits {self.base_logits} ({self.base_logits_bytes / 1e6:,.0f} MB), {how}, "
            f"{self.threads} threads; KL in nats, ± one standard error over windows",
            f"noise floor: KL of the source with itself is {floor}",
            "",
            table([head for head, _ in _COLUMNS], [_source_cells(self), *map(_cells, self.rows)]),
        ]
        if self.rows:
            lines += ["", *(_what(row) for row in _distinct(self.rows))]
            lines += [f"note: {row.name}: {note}" for row in self.rows for note in row.notes]
        return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without lines: the first column to the left, figures to the right."""
    widths = [max(len(cells[i]) for cells in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in [head, *rows]
    )


def _error(value: str, error: str | None) -> str:
    return value if error is None else f"{value} ± {error}"


def _scientific(value: float, digits: int = 3) -> str:
    """Write a number as the other verbs do: no zeros in the exponent, and a plain 0."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}"


def _kld(f: Fidelity) -> str:
    return _error(_scientific(f.kld), None if f.kld_error is None else _scientific(f.kld_error, 1))


def _percent(f: Fidelity) -> str:
    return _error(f"{100 * f.top1:.2f}", None if f.top1_error is None else f"{100 * f.top1_error:.2f}")


def _ratio(f: Fidelity) -> str:
    return _error(f"{f.ppl_ratio:.5f}", None if f.ppl_ratio_error is None else f"{f.ppl_ratio_error:.5f}")


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = [
    ("model", lambda r: r.name),
    ("bpw", lambda r: "-" if r.matrices is None else f"{r.matrices.bits_per_weight:.3f}"),
    ("file bpw", lambda r: f"{r.file.bits_per_weight:.3f}"),
    ("x vs FP32", lambda r: f"{r.file.x_vs_fp32:.2f}"),
    ("x vs 16-bit", lambda r: f"{r.file.x_vs_16bit:.2f}"),
    ("nMSE", lambda r: "-" if r.nmse is None else _scientific(r.nmse)),
    ("mean KL", lambda r: _kld(r.fidelity)),
    ("KL 99 %", lambda r: _scientific(r.fidelity.kld_p99)),
    ("KL 99.9 %", lambda r: _scientific(r.fidelity.kld_p999)),
    ("max KL", lambda r: _scientific(r.fidelity.kld_max)),
    ("same top-1 %", lambda r: _percent(r.fidelity)),
    ("PPL", lambda r: f"{r.fidelity.ppl:.4f}"),
    ("PPL ratio", lambda r: _ratio(r.fidelity)),
    ("memory MB", lambda r: f"{r.memory_bytes / 1e6:.1f}"),
    ("s", lambda r: f"{(r.encode_seconds or 0) + r.load_seconds + r.score_seconds:.1f}"),
]


def _cells(row: Row) -> list[str]:
    return [cell(row) for _, cell in _COLUMNS]


def _source_cells(e: Evaluation) -> list[str]:
    """Return the baseline's cells: the columns that compare it with itself stay empty."""
    base = e.baseline
    known = {
        "model": "(source)",
        "file bpw": f"{base.size.bits_per_weight:.3f}",
        "x vs FP32": f"{base.size.x_vs_fp32:.2f}",
        "x vs 16-bit": f"{base.size.x_vs_16bit:.2f}",
        "PPL": f"{base.ppl:.4f}",
        "memory MB": f"{base.memory_bytes / 1e6:.1f}",
        "s": f"{base.load_seconds + base.score_seconds:.1f}",
    }
    return [known.get(head, "-") for head, _ in _COLUMNS]


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """Leave out, of the rows of codecs, all that quantize just the matrices of the first one with just their codec."""
    plain = [row for row in rows if row.kind == "codec" and list(row.codecs) == [row.name]]
    return [row for row in rows if row not in plain or row is plain[0]]


def _what(row: Row) -> str:
    if row.matrices is None:
        return f"{row.name}: nothing is quantized"
    parts = ", ".join(f"{tensors} in {codec}" for codec, tensors in row.codecs.items())
    share = f"{row.matrices.weights:,} of {row.file.weights:,} weights"
    if list(row.codecs) == [row.name]:
        return f"each codec alone: {row.codecs[row.name]} tensors inside the layers, {share}; the rest as in the source"
    return f"{row.name}: quantized tensors: {parts}; {share}"
