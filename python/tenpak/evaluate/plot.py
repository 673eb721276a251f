"""Loss against rate as a picture: KL divergence, logarithmic, over bits per weight of the quantized matrices."""

import json
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

    figure = Figure(figsize=(11, 7.5), dpi=110, layout="constrained")
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
    """Write each point's name beside it, at the first of a few places that cover no other name or point."""
    places = [(6, 0), (-6, 0), (0, 9), (0, -9), *((x, y) for y in (14, -14, 22, -22, 30, -30) for x in (6, -6))]
    at = axes.transData.transform([(bits, kld) for (_, bits, kld), _ in points])
    taken: list[Any] = []
    for ((name, bits, kld), colour), here in zip(points, at, strict=True):
        text = None
        for x, y in places:
            if text is not None:
                text.remove()
            text = axes.annotate(
                name,
                (bits, kld),
                (x, y),
                textcoords="offset points",
                ha="center" if x == 0 else "left" if x > 0 else "right",
                va="center",
                fontsize=7,
                color=colour,
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour} if abs(y) > 9 else None,
            )
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and not any(
                box.contains(*other) for other in at if other is not here
            ):
                break
        taken.append(box)
