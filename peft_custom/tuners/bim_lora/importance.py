"""From features to importance scores: a heuristic of them, and the network that learns it.

    n_k = clip((g_k - P_lo)/(P_hi - P_lo), 0, 1),  g = √F̂1, ∛F̂2, ln F̂3, ln F̂4
    f = (0.60 n1 + 0.20 n2 + 0.15 n3 + 0.05 n4) · ω_layer(F5) · ω_type(F6)
    label = 0.05 + 0.9 σ(8(π - ½)),  π the rank of f among all blocks, in [0, 1]

Ranks within the middle half get noise. The network, LayerNorm or standardisation, then 6-64-32-1
with ReLU and dropout, is trained once on all blocks by the cross-entropy with these labels.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...rng import generator
from .config import BimLoraConfig
from .features import FLOOR, KINDS

PERCENTILES = ((2.0, 98.0), (5.0, 95.0), (5.0, 95.0), (5.0, 95.0))
SPREAD, STEEPNESS, LABEL_LOW, LABEL_RANGE, NOISE = 0.03, 8.0, 0.05, 0.90, 0.02
LABEL_CLIP = (0.01, 0.99)
LEAST_BATCHES = 32


def _ranks(values: Tensor) -> Tensor:
    """Ranks in [0, 1] with ties averaged; ½ for a single value."""
    n = values.numel()
    if n == 1:
        return torch.full_like(values, 0.5)
    ordered, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    del ordered
    ends = counts.cumsum(0)
    average = (ends - counts + ends - 1).double() / 2.0
    return average[inverse] / (n - 1)


def _rescaled(values: Tensor, low: float, high: float) -> Tensor:
    """Between two percentiles (linearly interpolated) to [0, 1]; ½ where they coincide."""
    ordered = values.sort().values
    n = values.numel()

    def percentile(q: float) -> Tensor:
        place = q / 100.0 * (n - 1)
        below = int(place)
        return torch.lerp(ordered[below], ordered[min(below + 1, n - 1)], place - below)

    start, end = percentile(low), percentile(high)
    if float(end - start) <= FLOOR:
        return torch.full_like(values, 0.5)
    return ((values - start) / (end - start)).clamp(0.0, 1.0)


@torch.no_grad()
def soft_labels(
    features: Tensor,
    weights: list[float] | None = None,
    *,
    noise: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """The heuristic importance of every block, (n,) in [0.01, 0.99].

    Args:
        features: normalised F̂, (n, 6); see `features.normalised`.
        weights: of n1 … n4.
        noise: standard deviation added where 0.25 < π < 0.75.
        seed: of that noise.
    """
    values = features.double()
    w = torch.tensor(weights or [0.60, 0.20, 0.15, 0.05], dtype=torch.float64, device=values.device)
    g = [
        (values[:, 0] + FLOOR).sqrt(),
        (values[:, 1] + FLOOR).pow(1.0 / 3.0),
        (values[:, 2] + FLOOR).log(),
        (values[:, 3] + FLOOR).log(),
    ]
    n = torch.stack([_rescaled(v, *P) for v, P in zip(g, PERCENTILES, strict=True)], dim=1)
    by_layer = 1.0 + torch.exp(-(values[:, 4] - 0.5).square() / SPREAD)
    by_type = torch.ones_like(by_layer)
    for kind in KINDS.values():
        by_type[(values[:, 5] - kind.code).abs() < 0.01] = kind.weight
    place = _ranks(n @ w * by_layer * by_type)
    labels = LABEL_LOW + LABEL_RANGE * torch.sigmoid(STEEPNESS * (place - 0.5))
    if noise:
        drawn = torch.randn(len(labels), generator=generator(seed), dtype=torch.float64)
        middle = (place > 0.25) & (place < 0.75)
        labels = labels + noise * drawn.to(labels.device) * middle
    return labels.clamp(*LABEL_CLIP).float()


class ImplicitMLP(nn.Module):
    """Scores in (0, 1) from six features: 6-64-32-1, its inputs standardised or layer-normalised.

    Args:
        config: `mlp_hidden_dim`, `mlp_dropout`; `reference_compat` chooses the LayerNorm.
    """

    def __init__(self, config: object = None) -> None:
        super().__init__()
        hidden = int(getattr(config, "mlp_hidden_dim", 64))
        p = float(getattr(config, "mlp_dropout", 0.1))
        normalise = bool(getattr(config, "reference_compat", True))
        self.norm = nn.LayerNorm(6) if normalise else None
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("std", torch.ones(6))
        self.layers = nn.Sequential(
            nn.Linear(6, hidden), nn.ReLU(), nn.Dropout(p),
            nn.Linear(hidden, hidden // 2), nn.ReLU(), nn.Dropout(p),
            nn.Linear(hidden // 2, 1),
        )  # fmt: skip
        self.initialise(0)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Xavier-uniform weights and zero biases, a function of `seed` alone."""
        drawn = generator(seed, 0x3179)
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                bound = (6.0 / sum(layer.weight.shape)) ** 0.5
                u = torch.rand(layer.weight.shape, generator=drawn)
                layer.weight.copy_(bound * (2.0 * u - 1.0))
                layer.bias.zero_()

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Takes mean and standard deviation of the inputs, (n, 6), as those to remove."""
        std, mean = torch.std_mean(features.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def logits(self, features: Tensor) -> Tensor:
        """ln(ŝ/(1 - ŝ)), (n,)."""
        x = (features - self.mean) / self.std
        return self.layers(x if self.norm is None else self.norm(x))[:, 0]

    def forward(self, features: Tensor) -> Tensor:
        """ŝ, (n,), of features (n, 6)."""
        return torch.sigmoid(self.logits(features))

    @torch.no_grad()
    def predict_batch(self, features: Tensor, batch_size: int | None = None) -> Tensor:
        """ŝ in evaluation mode, in batches."""
        training = self.training
        self.eval()
        parts = [self(rows) for rows in features.split(batch_size or 1 << 18)]
        self.train(training)
        return torch.cat(parts)


def network_inputs(values: Tensor) -> Tensor:
    """What the network sees, (n, 6): ln F1 … ln F4 without outliers, F5, F6; to be standardised.

    Logarithms are cut off at 1 % and 99 % of the blocks, so that one strange matrix does not set
    the scale of all.
    """
    logs = values[:, :4].double().clamp(min=1e-30).log()
    ordered = logs.sort(dim=0).values
    n = len(logs)
    low, high = ordered[int(0.01 * (n - 1))], ordered[int(round(0.99 * (n - 1)))]
    logs = torch.minimum(torch.maximum(logs, low), high)
    return torch.cat([logs.float(), values[:, 4:]], dim=1)


def train_mlp(
    mlp: ImplicitMLP, inputs: Tensor, labels: Tensor, config: BimLoraConfig, seed: int = 0
) -> dict[str, list[float]]:
    """Trains on all blocks; keeps the state of the lowest validation loss.

    Adam on the cross-entropy with soft labels, batches of `mlp_batch_size` (smaller ones where an
    epoch would have fewer than 32 of them; not with the LayerNorm), at most `mlp_epochs` epochs,
    stopped after `mlp_early_stop_patience` without a better validation loss. The result is a
    function of the inputs and the seed.

    Returns:
        `train_loss` and `val_loss` by epoch.
    """
    if mlp.norm is None:
        mlp.standardise(inputs)
    n, device = len(inputs), inputs.device
    order = torch.randperm(n, generator=generator(seed, 0x5917)).to(device)
    held = int(n * config.mlp_val_split)
    val, train = order[:held], order[held:]
    size = config.mlp_batch_size
    if mlp.norm is None:
        size = max(64, min(size, len(train) // LEAST_BATCHES))
    optimizer = torch.optim.Adam(mlp.parameters(), lr=config.mlp_lr)
    history: dict[str, list[float]] = {"train_loss": [], "val_loss": []}
    best, worse, kept = float("inf"), 0, None
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(generator(seed, 0xD809).initial_seed() % 2**63)
        for epoch in range(config.mlp_epochs):
            mlp.train()
            total = torch.zeros((), device=device)
            shuffle = torch.randperm(len(train), generator=generator(seed, 0x5918, epoch))
            for rows in train[shuffle.to(device)].split(size):
                loss = F.binary_cross_entropy_with_logits(mlp.logits(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(rows)
            history["train_loss"].append(float(total) / max(1, len(train)))
            mlp.eval()
            with torch.no_grad():
                chosen = val if held else train
                loss = F.binary_cross_entropy_with_logits(
                    mlp.logits(inputs[chosen]), labels[chosen]
                )
            history["val_loss"].append(float(loss))
            if float(loss) < best:
                best, worse = float(loss), 0
                kept = copy.deepcopy(mlp.state_dict())
            else:
                worse += 1
                if worse >= config.mlp_early_stop_patience:
                    break
    if kept is None:
        raise ValueError("the importance network's loss is not finite; look at the features")
    mlp.load_state_dict(kept)
    mlp.eval()
    return history
