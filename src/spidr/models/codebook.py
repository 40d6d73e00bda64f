"""Online clustering of the teacher's layers, and the statistics that a training step gathers for it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spidr.models.kernels import known

NUM_EXTRA = 16
"""Room for other counts of the training loop."""

SPLIT = 1 / 64
"""How far each half of a split codeword moves, relative to the codeword."""


@known
class Codebook(nn.Module):
    """``V`` clusters of one layer, as exponential moving sums: ``codebook (V, D)`` and ``counts (V,)``, float32.

    Codeword ``v`` is ``codebook[v] / counts[v]``. ``idle (V,)``, int64 and in no state dict, counts the steps since a
    codeword last got a frame, if :meth:`revive` is called after each.

    Args:
        encoder_embed_dim: Features of a frame, D.
        codebook_size: Number of codewords, V.
        codebook_decay: Weight of the past in an update; from 1 on nothing is updated.

    Attributes:
        managed: Whether a model updates the codebook. Otherwise it updates itself when called in training mode.
    """

    codebook: Tensor
    counts: Tensor
    idle: Tensor

    def __init__(self, encoder_embed_dim: int, codebook_size: int, codebook_decay: float) -> None:
        super().__init__()
        self.codebook_size, self.codebook_decay = codebook_size, codebook_decay
        self.managed = False
        self.register_buffer("codebook", torch.empty(codebook_size, encoder_embed_dim))
        self.register_buffer("counts", torch.empty(codebook_size))
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new codewords: standard normal, standardised over the codewords for each feature. Counts become 1."""
        size, dim = self.codebook.shape
        draw = torch.randn(dim, size, device=self.codebook.device)
        self.codebook.copy_(normalise_over_time(draw.T) if size > 1 else draw.T)
        self.counts.fill_(1.0)

    @property
    def codewords(self) -> Tensor:
        """The cluster centres, (V, D)."""
        return self.codebook / self.counts.unsqueeze(1)

    @torch.no_grad()
    def forward(self, target: Tensor) -> Tensor:
        """Assign frames (N, D) to their nearest codewords: one-hot, (N, V) float32."""
        labels = assign(target.float().unsqueeze(0), self.codewords.unsqueeze(0))[0]
        one_hot = F.one_hot(labels, self.codebook_size).float()
        if self.training and not self.managed and self.codebook_decay < 1:
            self.step(one_hot, target)
        return one_hot

    @torch.no_grad()
    def step(self, onehot_target: Tensor, target: Tensor) -> None:
        """Update with the frames (N, D) of all processes, given which codewords (N, V) they are assigned to."""
        totals = torch.cat([onehot_target.T @ target.float(), onehot_target.sum(0).unsqueeze(1)], dim=1)
        all_reduce(totals)
        self.update(totals[:, :-1], totals[:, -1])

    @torch.no_grad()
    def update(self, sums: Tensor, assigned: Tensor) -> None:
        """Move towards the frames of a step. Codewords that got none stay as they are.

        Args:
            sums: Sum of the frames assigned to each codeword, (V, D).
            assigned: How many they were, (V,).
        """
        used, decay = assigned > 0, self.codebook_decay
        self.counts.copy_(torch.where(used, decay * self.counts + (1 - decay) * assigned, self.counts))
        moved = decay * self.codebook + (1 - decay) * sums
        self.codebook.copy_(torch.where(used.unsqueeze(1), moved, self.codebook))

    @torch.no_grad()
    def revive(self, assigned: Tensor, after: int) -> None:
        """Give codewords that have got no frame for ``after`` steps half of the busiest clusters.

        The j-th of them and the j-th busiest codeword become two codewords on either side of the latter, each with half
        of its weight, as faiss does in k-means. Nothing is drawn, so all processes do the same; nothing waits for the
        device.

        Args:
            assigned: How many frames each codeword got in this step, (V,).
            after: In steps.
        """
        self.idle.copy_(torch.where(assigned > 0, 0, self.idle + 1))
        dead = self.idle >= after
        turn, order = dead.cumsum(0) - 1, torch.arange(len(dead), device=dead.device)
        revived = dead & (turn < (assigned > 1).sum())
        busiest = assigned.argsort(descending=True, stable=True)
        is_split = torch.zeros_like(dead).scatter(0, busiest, order < revived.sum())
        source = torch.where(revived, busiest[turn.clamp(min=0)], order)
        sign = 1.0 - 2.0 * (torch.arange(self.codebook.shape[1], device=dead.device) % 2)
        shift = SPLIT * (revived.float() - is_split.float())
        weight = torch.where(revived | is_split, 0.5, 1.0)
        self.codebook.copy_(self.codebook[source] * (1 + shift.unsqueeze(1) * sign) * weight.unsqueeze(1))
        self.counts.copy_(self.counts[source] * weight)
        self.idle.masked_fill_(revived, 0)


def normalise_over_time(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Give every feature mean 0 and population variance 1 over the last dimension but one: (..., T, D), in float32."""
    x = x.float()
    x = x - x.mean(dim=-2, keepdim=True)  # on a CPU, var_mean takes four times as long
    return x * torch.rsqrt(x.square().mean(dim=-2, keepdim=True) + eps)


def assign(targets: Tensor, codewords: Tensor) -> Tensor:
    """Indices (K, N) of the codewords (K, V, D) nearest to targets (K, N, D), in Euclidean distance."""
    bias = -0.5 * codewords.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(bias, targets, codewords.transpose(1, 2)).argmax(-1)


def all_reduce(x: Tensor) -> None:
    """Sum over the default process group in place, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)


def count_perplexity(counts: Tensor) -> Tensor:
    """Perplexity, 2 to the entropy in bits, of the distributions that ``counts (..., V)`` are proportional to."""
    probabilities = counts / counts.sum(-1, keepdim=True)
    return (-torch.xlogy(probabilities, probabilities).sum(-1)).exp()


class StepStatistics(nn.Module):
    """Sums over the micro-batches of an optimiser step, in one flat buffer for a single all-reduce.

    ``sums (K, V, D)`` and ``assigned (K, V)`` are the frames assigned to each codeword and their number, ``predicted
    (K, V)`` the sum of the predicted distributions, ``loss ()`` and ``frames ()`` the loss summed over the masked
    frames and their number. ``extra (16,)`` is for whatever else the caller wants summed. Nothing of it is in
    checkpoints: it is zero between steps.
    """

    flat: Tensor

    def __init__(self, num_codebooks: int, size: int, dim: int) -> None:
        super().__init__()
        self.shapes = {
            "sums": torch.Size([num_codebooks, size, dim]),
            "assigned": torch.Size([num_codebooks, size]),
            "predicted": torch.Size([num_codebooks, size]),
            "loss": torch.Size([]),
            "frames": torch.Size([]),
            "extra": torch.Size([NUM_EXTRA]),
        }
        total = sum(shape.numel() for shape in self.shapes.values())
        self.register_buffer("flat", torch.zeros(total), persistent=False)

    def view(self) -> dict[str, Tensor]:
        """The parts by name, as views of the buffer."""
        parts = self.flat.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    @torch.no_grad()
    def add(self, targets: Tensor | None, labels: Tensor, probabilities: Tensor, loss: Tensor) -> None:
        """Count the masked frames of a micro-batch. Without targets, codebooks cannot move."""
        num_codebooks, size, dim = self.shapes["sums"]
        views = self.view()
        offsets = size * torch.arange(num_codebooks, device=labels.device).unsqueeze(1)
        index = (labels + offsets).flatten()
        if targets is not None:
            views["sums"].view(-1, dim).index_add_(0, index, targets.reshape(-1, dim))
        views["assigned"].view(-1).index_add_(0, index, torch.ones_like(index, dtype=self.flat.dtype))
        views["predicted"].add_(probabilities)
        views["loss"].add_(loss.sum())
        views["frames"].add_(labels.shape[1])
