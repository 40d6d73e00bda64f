"""Online clustering, against loops written from its definition."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from spidr.models.codebook import Codebook, StepStatistics, assign, count_perplexity, normalise_over_time


def test_initial_codewords() -> None:
    """Standard normal, then standardised over the codewords for each feature; counts are 1."""
    codebook = Codebook(48, 256, 0.9)
    assert torch.equal(codebook.counts, torch.ones(256))
    torch.testing.assert_close(codebook.codebook.mean(0), torch.zeros(48), atol=1e-5, rtol=0)
    torch.testing.assert_close(codebook.codebook.std(0, correction=0), torch.ones(48), atol=1e-4, rtol=0)
    assert torch.equal(codebook.codewords, codebook.codebook)


def test_reset_gives_new_codewords() -> None:
    codebook = Codebook(4, 16, 0.9)
    before = codebook.codebook.clone()
    codebook.counts.fill_(7)
    codebook.reset_parameters()
    assert torch.equal(codebook.counts, torch.ones(16))
    assert not torch.equal(codebook.codebook, before)


def test_normalise_over_time_within_each_utterance() -> None:
    x = torch.randn(3, 50, 4) * 5 + 2
    torch.testing.assert_close(
        normalise_over_time(x), torch.nn.functional.instance_norm(x.transpose(1, 2)).transpose(1, 2)
    )
    assert normalise_over_time(x.bfloat16()).dtype == torch.float32


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 9), st.integers(0, 1000))
def test_assignment_is_the_nearest_codeword(books: int, frames: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(books, frames, 5, generator=generator)
    codewords = torch.randn(books, size, 5, generator=generator)
    labels = assign(targets, codewords)
    distances = torch.cdist(targets.double(), codewords.double())
    chosen = distances.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, distances.amin(-1), rtol=1e-4, atol=1e-4)


def test_update_moves_only_used_codewords() -> None:
    torch.manual_seed(0)
    codebook = Codebook(3, 6, 0.9)
    before, counts = codebook.codebook.clone(), torch.arange(1.0, 7.0)
    codebook.counts.copy_(counts)
    targets, labels = torch.randn(20, 3), torch.randint(0, 4, (20,))  # codewords 4 and 5 get nothing
    sums = torch.zeros(6, 3).index_add_(0, labels, targets)
    assigned = labels.bincount(minlength=6).float()
    codebook.update(sums, assigned)
    for v in range(6):
        frames = targets[labels == v]
        if len(frames):
            torch.testing.assert_close(codebook.codebook[v], 0.9 * before[v] + 0.1 * frames.sum(0))
            torch.testing.assert_close(codebook.counts[v], 0.9 * counts[v] + 0.1 * len(frames))
        else:
            assert torch.equal(codebook.codebook[v], before[v])
            assert codebook.counts[v] == counts[v]


def test_revival_splits_the_busiest() -> None:
    torch.manual_seed(0)
    codebook = Codebook(4, 6, 0.9)
    codebook.counts.copy_(torch.arange(1.0, 7.0))
    codewords, counts = codebook.codewords.clone(), codebook.counts.clone()
    assigned = torch.tensor([0.0, 5.0, 9.0, 1.0, 0.0, 0.0])
    codebook.revive(assigned, after=3)
    codebook.revive(assigned.roll(1), after=3)  # codeword 4 gets one frame, 3 gets nine
    assert codebook.idle.tolist() == [2, 1, 0, 0, 0, 2]
    assert torch.equal(codebook.codewords, codewords)
    codebook.revive(assigned, after=3)
    assert codebook.idle.tolist() == [0, 0, 0, 0, 1, 0]
    for dead, busy in ((0, 2), (5, 1)):  # the busiest first
        torch.testing.assert_close((codebook.codewords[dead] + codebook.codewords[busy]) / 2, codewords[busy])
        assert not torch.equal(codebook.codewords[dead], codebook.codewords[busy])
        assert codebook.counts[dead] == codebook.counts[busy] == counts[busy] / 2
    for untouched in (3, 4):
        torch.testing.assert_close(codebook.codebook[untouched], codewords[untouched] * counts[untouched])


def test_revival_leaves_single_frames_and_living_codewords_alone() -> None:
    codebook = Codebook(3, 4, 0.9)
    before = codebook.codebook.clone()
    codebook.revive(torch.tensor([1.0, 1.0, 0.0, 0.0]), after=1)  # nothing to split
    assert torch.equal(codebook.codebook, before)
    codebook.revive(torch.ones(4) * 3, after=1)
    assert torch.equal(codebook.codebook, before)
    assert codebook.idle.tolist() == [0, 0, 0, 0]


def test_revival_brings_all_codewords_into_use() -> None:
    """Eight clusters of points; all codewords but one start far away."""
    generator = torch.Generator().manual_seed(0)
    points = 5 * torch.randn(8, 16, generator=generator).repeat_interleave(50, 0)
    points += 0.5 * torch.randn(points.shape, generator=generator)
    active = []
    for after in (0, 5):
        codebook = Codebook(16, 16, 0.5)
        codebook.codebook[1:] += 100
        for _ in range(100):
            labels = assign(points[None], codebook.codewords[None])[0]
            sums = torch.zeros(16, 16).index_add_(0, labels, points)
            assigned = labels.bincount(minlength=16).float()
            codebook.update(sums, assigned)
            if after:
                codebook.revive(assigned, after)
        active.append(int((assigned > 0).sum()))
    assert active == [1, 16]


def test_statistics_add_up() -> None:
    torch.manual_seed(0)
    whole, parts = StepStatistics(2, 5, 3), StepStatistics(2, 5, 3)
    targets, labels = torch.randn(2, 12, 3), torch.randint(0, 5, (2, 12))
    probabilities, loss = torch.randn(2, 12, 5).softmax(-1), torch.rand(12)
    whole.add(targets, labels, probabilities.sum(1), loss)
    for part in (slice(0, 7), slice(7, 12)):
        parts.add(targets[:, part], labels[:, part], probabilities[:, part].sum(1), loss[part])
    torch.testing.assert_close(parts.flat, whole.flat)
    views = whole.view()
    assert views["frames"] == 12
    torch.testing.assert_close(views["loss"], loss.sum())
    for k in range(2):
        assert torch.equal(views["assigned"][k], labels[k].bincount(minlength=5).float())
        for v in range(5):
            torch.testing.assert_close(views["sums"][k, v], targets[k, labels[k] == v].sum(0))
    assert not whole.state_dict()  # zero between steps, so not part of a checkpoint


@pytest.mark.parametrize(("counts", "expected"), [([1, 1, 1, 1], 4.0), ([5, 0, 0, 0], 1.0), ([3, 3, 0, 0], 2.0)])
def test_perplexity_of_counts(counts: list[int], expected: float) -> None:
    assert count_perplexity(torch.tensor(counts, dtype=torch.float32)).item() == pytest.approx(expected)
