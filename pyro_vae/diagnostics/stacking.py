"""Stacking weights: the mixture of models that predicts held-out rows best."""

import numpy as np

__all__ = ["stacking_weights"]

TOLERANCE = 1e-5  # nats per row, below the largest log score
MAX_STEPS = 1000


def stacking_weights(log_evidence: np.ndarray) -> np.ndarray:
    r"""Returns the weights of the mixture of models with the largest log score.

    .. math:: \hat w = \arg\max_w \sum_i \log \sum_k w_k \, p_k(x_i)

    They are found by EM. The largest log p(x) of each row is subtracted first, so that rows with
    a log p(x) of -900 or +900 neither underflow nor overflow. Equal models share their weight.

    References:
        Using stacking to average Bayesian predictive distributions (Yao et al., 2018),
        arXiv 1704.02030.

    Arguments:
        log_evidence: log p(x) of each row by each model, shape (rows, models), in nats. NaN
            counts as -inf; rows that no model can produce are left out.

    Returns:
        The weights, shape (models,), which sum to 1; NaN if no model can produce any row.

    Example:
        >>> stacking_weights(np.array([[-900.0, -902.0], [-901.0, -909.0]])).round(3).tolist()
        [1.0, 0.0]
    """
    scores = np.where(np.isnan(log_evidence), -np.inf, log_evidence)
    scores = scores[scores.max(axis=1) > -np.inf]
    models = scores.shape[1]
    if not len(scores):
        return np.full(models, np.nan)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights = np.full(models, 1 / models)
    for _ in range(MAX_STEPS):
        ratios = (scores / (scores @ weights)[:, None]).mean(axis=0)
        if ratios.max() - 1 < TOLERANCE:  # a bound of the distance from the largest log score
            break
        weights = weights * ratios
    return weights
