"""IVON, the variational optimiser: AdamW's cost, and a Gaussian posterior over the weights.

Example:
    >>> optimizer = IVON(model.parameters(), lr=0.1, ess=len(train_set))
    >>> for batch in loader:
    ...     for _ in range(optimizer.mc_samples):
    ...         with optimizer.sampled_params(train=True):
    ...             model(**batch).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> with optimizer.sampled_params():  # one draw of the posterior, for prediction
    ...     logits = model(**batch).logits
"""

from .optimizer import IVON

__all__ = ["IVON"]
