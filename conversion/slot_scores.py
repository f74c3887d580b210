"""The score by which a layer fills its slots, in closed form: whether a token is part of a stated fact."""

from collections.abc import Sequence

import torch


# The penalty, as a share of the mean variance of the inputs. A tenth of it does the same.
RIDGE = 1e-2


def fit_slot_score(windows: Sequence[torch.Tensor], is_fact: torch.Tensor) -> torch.Tensor:
    """
    Ridge regression of whether a token is part of a fact on the input x of a layer's attention:

        W = Cov(y, x) (Cov(x) + RIDGE * mean Var(x) * I)^-1

    The intercept is left out: it moves all scores alike.

    Args:
        windows: x, `(T, hidden_size)` each, without the sinks. One of them is taken to float32 at a time.
        is_fact: y, `(windows, T)` bool.

    Returns:
        `(1, hidden_size)`, float32.

    Raises:
        ValueError: if all tokens are of facts, or none.
    """
    if is_fact.all() or not is_fact.any():
        raise ValueError("A score tells facts from text: tokens of both are needed.")
    # Near the mean of all: sums of squares far from it would lose the digits of their differences.
    origin = windows[0].float().mean(0)
    sums, products, facts = (
        torch.zeros_like(origin),
        origin.new_zeros(len(origin), len(origin)),
        torch.zeros_like(origin),
    )
    for window, labels in zip(windows, is_fact):
        states = window.float() - origin
        sums += states.sum(0)
        products += states.T @ states
        facts += states[labels].sum(0)
    mean, share = sums / is_fact.numel(), is_fact.float().mean()
    covariance = products / is_fact.numel() - torch.outer(mean, mean)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return torch.linalg.solve(covariance, facts / is_fact.numel() - share * mean).unsqueeze(0)
