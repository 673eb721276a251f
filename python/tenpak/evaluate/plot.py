"""Loss against rate as a picture: KL divergence, logarithmic, over bits per weight of the quantized matrices."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._errors import InvalidError
from .report import Evaluation


@dataclass(frozen=True)
class Peers:
    """What other tools reach, measured by the same protocol.

    Attributes
    ----------
    path
        Where it was read.
    context, tokens
        Tokens of a window and in all windows.
    points
        Name, bits per weight and mean KL divergence in nats of each.
    """

    path: Path
    context: int
    tokens: int
    points: list[tuple[str, float, float]]


def read_peers(path: Path, model: str, text: str) -> Peers:
    """Read other tools' figures.

    Parameters
    ----------
    path
        JSON object: ``model``, ``text`` (names of directory and file), ``ctx`` and ``tokens`` (tokens of a window and
        in all), ``rows`` of ``name``, ``bpw`` (bits per weight) and ``kld`` (mean, in nats).
    model, text
        What is measured here.

    Raises
    ------
    InvalidError
        It has another form, or another model or text.
    OSError
        It cannot be read.
    """
    try:
        peers = json.loads(path.read_bytes())
        points = [(str(row["name"]), float(row["bpw"]), float(row["kld"])) for row in peers["rows"]]
        read = Peers(path, int(peers["ctx"]), int(peers["tokens"]), points)
        theirs = (peers["model"], peers["text"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidError(
            f"{path}: not figures of peers ({type(error).__name__}: {error}), expected an object of model, text, ctx, "
            "tokens and rows of name, bpw and kld"
        ) from error
    ours = (Path(model).resolve().name, Path(text).name)
    if theirs != ours:
        raise InvalidError(
            f"{path} was measured with {theirs[0]} on {theirs[1]}, this run is {ours[0]} on {ours[1]}; "
            "figures of different protocols do not compare"
        )
    return read


def check_library() -> None:
    """Check that matplotlib is there, or say how to get it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'--plot needs matplotlib: {error}; install it with: pip install "tenpak[eval]"') from error


def draw(evaluation: Evaluation, path: Path, peers: Peers | None) -> None:
    """Draw the rows that lose something, and the peers', as labelled points.

    Parameters
    ----------
    evaluation
        What to draw.
    path
        PNG to write.
    peers
        Other tools' figures.

    Raises
    ------
    InvalidError
        The peers were measured with other windows or tokens, or there is no point to draw.
    """
    tokens = evaluation.context * evaluation.windows
    if peers is not None and (peers.context, peers.tokens) != (evaluation.context, tokens):
        raise InvalidError(
            f"{peers.path} was measured on {peers.tokens} tokens in windows of {peers.context}, this run is {tokens} "
            f"in windows of {evaluation.context}; figures of different protocols do not compare"
        )
    ours = [
        (row.name, row.matrices.bits_per_weight, row.fidelity.kld)
        for row in evaluation.rows
        if row.matrices is not None and row.fidelity.kld > 0
    ]
    theirs = [point for point in peers.points if point[2] > 0] if peers is not None else []
    if not ours:
        raise InvalidError(f"{path}: no row loses anything, so there is no point to draw; pass --codec or --artifact")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    if peers is not None:
        rates, losses = [p[1] for p in theirs], [p[2] for p in theirs]
        axes.scatter(rates, losses, s=22, c="0.55", marker="s", label=peers.path.name)
    axes.scatter([p[1] for p in ours], [p[2] for p in ours], s=34, c="tab:blue", label="tenpak", zorder=3)
    axes.set_xlabel("bits per weight of the quantized matrices")
    axes.set_ylabel("mean KL(source ‖ quantized), nats per token")
    axes.set_title(
        f"{Path(evaluation.model).resolve().name} on {Path(evaluation.text).name}: {evaluation.windows} windows of "
        f"{evaluation.context} tokens, {evaluation.dtype}"
    )
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.margins(x=0.12, y=0.08)
    if peers is not None:
        axes.legend(loc="upper right")
    canvas.draw()
    _label(axes, canvas.get_renderer(), [(p, "tab:blue") for p in ours] + [(p, "0.4") for p in theirs])
    figure.savefig(path, format="png")


def _label(axes: Any, renderer: Any, points: list[tuple[tuple[str, float, float], str]]) -> None:
    """Write each point's name where it covers no other name and no point, the nearest such place counting.

    Places are tried in rings around the point; where none is free, the name stands beside the point.
    """
    at = axes.transData.transform([(bits, kld) for (_, bits, kld), _ in points])
    pixels = renderer.points_to_pixels(1)
    taken = [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in at]
    for ((name, bits, kld), colour), (x, y) in zip(points, at, strict=True):
        text = axes.annotate(
            name,
            (bits, kld),
            (6, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "shrinkA": 0, "shrinkB": 2},
        )
        extent = text.get_window_extent(renderer)
        width, height = extent.width, extent.height
        for dx, dy in _PLACES:
            # The offset is that of the nearer end of the name.
            left = x + dx * pixels - (0 if dx > 0 else width)
            box = (left, y + dy * pixels - height / 2, left + width, y + dy * pixels + height / 2)
            if (
                axes.bbox.contains(*box[:2])
                and axes.bbox.contains(*box[2:])
                and not any(_overlap(box, t) for t in taken)
            ):
                text.set_position((dx, dy))
                text.set_horizontalalignment("left" if dx > 0 else "right")
                taken.append(box)
                break


#: Offsets from a point, in points of 1/72 inch, the nearest first.
_PLACES = [
    (radius * math.cos(angle), radius * math.sin(angle))
    for radius in (6, *range(12, 156, 12))
    for angle in (math.radians(degrees) for degrees in (0, 180, 30, -30, 150, -150, 60, -60, 120, -120))
]


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
