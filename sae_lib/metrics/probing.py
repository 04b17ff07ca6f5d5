"""Whether a property can be read off activations by a linear probe. Chapter `pocket`.

A probe that works shows that the property is there, in a form that a linear map can use; not that the model uses it.
Its accuracy means something only beside controls: the most frequent label, and inputs on which the property was never
taught.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lib.metrics.reconstruction import finite_matrices


class LinearProbe(NamedTuple):
    """A fitted probe: ``argmax(((x - mean) / spread) W + b)`` over the classes.

    Attributes:
        W: weights of standardised activations.
        b: of each class.
        mean: of the activations that it was fitted on.
        spread: their standard deviation; 1 for dimensions that do not vary.
        classes: the label of each column of W.
    """

    W: Float[Tensor, "d_in classes"]
    b: Float[Tensor, " classes"]
    mean: Float[Tensor, " d_in"]
    spread: Float[Tensor, " d_in"]
    classes: Int[Tensor, " classes"]

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Int[Tensor, " n"]:
        """The label of each row."""
        return self.classes[(((x - self.mean) / self.spread) @ self.W + self.b).argmax(1)]

    def accuracy(self, x: Float[Tensor, "n d_in"], labels: Int[Tensor, " n"]) -> float:
        """Share of rows whose label is predicted.

        >>> probe = linear_probe(torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([7, 7, 3, 3]))
        >>> probe.accuracy(torch.tensor([[-9.0], [0.5], [3.0]]), torch.tensor([7, 7, 3]))  # the second lies with 3
        0.6666666865348816
        """
        return (self(x) == labels).float().mean().item()


def linear_probe(
    x: Float[Tensor, "n d_in"], labels: Int[Tensor, " n"], penalty: float | int = 1.0, steps: int = 300
) -> LinearProbe:
    """Fit multinomial logistic regression on standardised activations (scikit-learn, L-BFGS).

    ``L = sum of cross-entropies + penalty / 2 * |W|^2``.

    Args:
        x: activations, a row an example.
        labels: the class of each row, any integers; at least two different ones.
        penalty: weight of the squared norm, above 0; larger means simpler.
        steps: most iterations.

    Raises:
        ValueError: if activations are not finite, shapes disagree, there is one class only, or the penalty is not
            above 0.
    """
    from sklearn.linear_model import LogisticRegression

    (x,) = finite_matrices(x=x)
    if len(labels) != len(x):
        raise ValueError(f"labels must name the class of each of the {len(x)} rows, got {len(labels)}")
    classes = labels.unique()
    if len(classes) < 2:
        raise ValueError(f"labels must hold at least two classes, got {classes.tolist()}")
    if not penalty > 0:
        raise ValueError(f"penalty must be above 0, got {penalty}")
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = spread.where(spread > 0, 1)
    fitted = LogisticRegression(C=1 / penalty, max_iter=steps).fit(((x - mean) / spread).numpy(), labels.numpy())
    W, b = torch.from_numpy(fitted.coef_.T).float(), torch.from_numpy(fitted.intercept_).float()
    if len(classes) == 2:  # scikit-learn keeps the difference of the two only
        W, b = torch.cat([-W, W], 1) / 2, torch.cat([-b, b]) / 2
    return LinearProbe(W, b, mean, spread, classes)
