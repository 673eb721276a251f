"""From logits to figures: divergences and likelihoods of every token, and their means with error bars.

Logits come in float32 and every sum is float64: KL is a small difference of large sums. A batch goes by in slices of
``SLICE`` logits, so that the float64 copies stay small whatever the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .report import Fidelity

Array = npt.NDArray[Any]
#: Most logits that are widened to float64 at once: 8 MiB.
SLICE = 1 << 20


@dataclass(frozen=True)
class Scores:
    """Measures of every scored token, each of shape ``[windows, context - 1]``.

    Attributes
    ----------
    kld
        KL(source ‖ model) in nats, float64.
    same
        Whether the most likely token is the source model's, bool.
    nll
        Negative log-likelihood of the token that follows in the text, in nats, float64.
    """

    kld: Array
    same: Array
    nll: Array

    @classmethod
    def empty(cls, windows: int, context: int) -> "Scores":
        """Return scores to be filled in, window by window."""
        shape = (windows, context - 1)
        return cls(np.zeros(shape), np.zeros(shape, bool), np.zeros(shape))

    def put(self, first: int, base: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Score a batch of windows.

        With p and q the softmax of a and b, KL(p ‖ q) = Σ p (a - b) - (logsumexp a - logsumexp b), which is exactly 0
        where a and b are equal.

        Parameters
        ----------
        first
            Number of the batch's first window.
        base, logits
            Logits of the source model and of the model, float32 ``[batch, context - 1, vocabulary]``.
        targets
            The tokens that follow, int64 ``[batch, context - 1]``.
        """
        count = targets.shape[0]
        kld, same, nll = (array[first : first + count].reshape(-1) for array in (self.kld, self.same, self.nll))
        a_all, b_all, t_all = base.flatten(0, 1), logits.flatten(0, 1), targets.flatten()
        step = max(1, SLICE // a_all.shape[1])
        for at in range(0, len(t_all), step):
            here = slice(at, at + step)
            a, b = a_all[here].double(), b_all[here].double()
            of_a, of_b = a.logsumexp(1), b.logsumexp(1)
            nll[here] = (of_b - b.gather(1, t_all[here, None])[:, 0]).numpy()
            same[here] = (a_all[here].argmax(1) == b_all[here].argmax(1)).numpy()
            p = (a - of_a[:, None]).exp_()
            # The divergence is never negative; its rounding may be.
            kld[here] = ((p * a.sub_(b)).sum(1) - (of_a - of_b)).clamp_(min=0).numpy()


def fidelity(scores: Scores, base_nll: Array) -> Fidelity:
    """Reduce scores to means, quantiles and error bars.

    Tokens of a window depend on each other, so the windows, all of one size, are the clusters of every standard
    error: that of a mean is the standard deviation of the windows' means over the root of their number.

    Parameters
    ----------
    scores
        Scores of the model.
    base_nll
        Negative log-likelihoods of the source model, ``[windows, context - 1]``.

    Returns
    -------
    Fidelity
        The figures.
    """
    kld, kld_error = mean(scores.kld)
    top1, top1_error = mean(scores.same.astype(np.float64))
    ppl, ppl_error = perplexity(scores.nll)
    ratio, ratio_error = perplexity(scores.nll - base_nll)
    p99, p999 = np.quantile(scores.kld, [0.99, 0.999])
    return Fidelity(
        kld=kld,
        kld_error=kld_error,
        kld_p99=float(p99),
        kld_p999=float(p999),
        kld_max=float(scores.kld.max()),
        top1=top1,
        top1_error=top1_error,
        ppl=ppl,
        ppl_error=ppl_error,
        ppl_ratio=ratio,
        ppl_ratio_error=ratio_error,
    )


def mean(values: Array) -> tuple[float, float | None]:
    """Return the mean of ``[windows, tokens]`` and its standard error over windows; None for one window."""
    windows = values.mean(1)
    error = float(windows.std(ddof=1) / np.sqrt(len(windows))) if len(windows) > 1 else None
    return float(windows.mean()), error


def perplexity(nll: Array) -> tuple[float, float | None]:
    """Return the exponential of the mean of ``[windows, tokens]`` and its standard error, to first order."""
    value, error = mean(nll)
    ppl = float(np.exp(value))
    return ppl, None if error is None else ppl * error
