"""The score by which a layer fills its slots, in closed form: whether a token is part of a stated fact."""

import torch


# The penalty, as a share of the mean variance of the inputs. A tenth of it does the same.
RIDGE = 1e-2


def fit_slot_score(hidden_states: torch.Tensor, is_fact: torch.Tensor) -> torch.Tensor:
    """
    Ridge regression of whether a token is part of a fact on the input x of a layer's attention:

        W = Cov(y, x) (Cov(x) + RIDGE * mean Var(x) * I)^-1

    The intercept is left out: it moves all scores alike.

    Args:
        hidden_states: x, `(T, hidden_size)`, without the sinks.
        is_fact: y, `(T,)` bool.

    Returns:
        `(1, hidden_size)`, float32.

    Raises:
        ValueError: if all tokens are of facts, or none.
    """
    if is_fact.all() or not is_fact.any():
        raise ValueError("A score tells facts from text: tokens of both are needed.")
    centred = hidden_states.float()
    centred = centred - centred.mean(0)
    labels = is_fact.to(centred)
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return torch.linalg.solve(covariance, centred.T @ (labels - labels.mean()) / len(centred)).unsqueeze(0)
