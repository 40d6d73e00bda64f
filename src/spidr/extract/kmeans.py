"""k-means on a layer's features, as an alternative to the codebook's units."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

import spidr
from spidr.environment import environment
from spidr.extract.options import Options
from spidr.extract.session import Session, Skipped
from spidr.extract.sources import Item, find_items, find_lengths, name_items
from spidr.models import DinoSR
from spidr.models.hub import check_name
from spidr.tools.errors import InputError, first_line
from spidr.tools.files import atomic_write, expand, make_folder
from spidr.tools.lazy import needs_extra
from spidr.tools.tensors import open_archive
from spidr.tools.untrusted import check_memory, parse_json

logger = logging.getLogger(__name__)

MAX_UNITS = 2**20


@dataclass(frozen=True)
class KMeans:
    """Centroids of features, float32 (K, D), with the model, layer and settings they were made with."""

    centroids: NDArray[np.float32]
    made: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Start of the SHA-256 of the centroids."""
        return hashlib.sha256(np.ascontiguousarray(self.centroids).data).hexdigest()[:16]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of :func:`fit_kmeans`. No code from the file is run."""
        if not os.path.exists(path):  # noqa: PTH110 (False for all that cannot be a file)
            raise InputError(f"{path}: does not exist; write it with `python -m spidr.extract kmeans`.")
        try:
            open_archive(path).close()  # checks that it is not a zip bomb
            with np.load(path, allow_pickle=False) as file:
                centroids, made = file["centroids"], parse_json(str(file["made"]))
            if centroids.dtype != np.float32 or centroids.ndim != 2 or not np.isfinite(centroids).all():
                raise ValueError("the centroids are not a matrix of finite numbers in float32")
            if len(centroids) < 2:
                raise ValueError("there are fewer than two centroids")
            if not isinstance(made["layer"], int) or made["layer"] < 1 or not {"model", "weights"} <= made.keys():
                raise ValueError("it does not say how it was made")
        except Exception as error:  # a damaged file can fail in any way
            reason = first_line(error)
            raise InputError(f"{path}: no k-means model of `python -m spidr.extract kmeans` ({reason}).") from None
        return cls(centroids, made)

    def check(self, session: Session) -> None:
        """Check that a session gives the features that the centroids were fitted to. Raises InputError if not."""
        made, settings, dim = self.made, session.settings(), session.model.cfg.encoder_embed_dim
        for key in ("layer", "weights"):
            if settings[key] != made[key]:
                of = f"the centroids are of {key} {made[key]} of {made['model']}"
                raise InputError(f"{of}, not of {settings[key]} of {settings['model']}")
        if self.centroids.shape[1] != dim:
            raise InputError(f"the centroids have {self.centroids.shape[1]} dimensions, the features {dim}")


class _Draw:
    """A random sample of frames from a stream of recordings: those with the lowest random numbers.

    Each recording's numbers are seeded by its name, so neither order nor batches matter. ``share`` is roughly the share
    of all frames that ``limit`` is.
    """

    def __init__(self, limit: int, share: float, seed: int) -> None:
        self.limit, self.share, self.seed = limit, share, seed
        self.drawn: dict[str, tuple[NDArray[np.float64], NDArray[np.float32]]] = {}
        self.count = 0

    def add(self, name: str, pieces: Iterable[NDArray[np.float32]]) -> None:
        """Draw from a recording's frames, (T, D) in pieces."""
        digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
        random, drawn = np.random.default_rng([self.seed, *digest[:16]]), []
        for frames in pieces:
            lots = random.random(len(frames))
            chosen = lots < self.share
            drawn.append((lots[chosen], frames[chosen]))
        lots, frames = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        self.drawn[name] = lots, frames
        self.count += len(lots)
        if self.count > 1.25 * self.limit:  # the share does not count recordings of unknown length
            self.reduce()

    def reduce(self) -> None:
        """Drop the frames beyond the limit."""
        if self.count > self.limit:
            all_lots = np.concatenate([lots for lots, _ in self.drawn.values()])
            self.share = float(np.partition(all_lots, self.limit)[self.limit])
            for name, (lots, frames) in self.drawn.items():
                chosen = lots < self.share
                self.drawn[name] = lots[chosen], frames[chosen]
            self.count = sum(len(lots) for lots, _ in self.drawn.values())


def fit_kmeans(
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: str | Path | DinoSR = "spidr_base",
    layer: int | None = None,
    units: int = 256,
    max_frames: int = 1_000_000,
    seed: int = 0,
    options: Options | None = None,
) -> Skipped:
    """Cluster features by scikit-learn's mini-batch k-means, and write the centroids as ``.npz``.

    Args:
        sources: Manifests, folders of recordings, audio files.
        output: The file to write.
        model: A published model's name, a checkpoint, or a model.
        layer: Counted from 1; None: the model's best.
        units: Number of clusters K, at least 2.
        max_frames: Maximum number of frames to learn from, drawn at random; a million of the base model's take 3 GB.
        seed: Seed of the draw and of k-means. The same seed, recordings and machine give the same centroids.
        options: How recordings are encoded.

    Returns:
        The recordings that were skipped.

    Raises:
        InputError: The input or model is wrong, no recording can be encoded, there are fewer frames than clusters, or
            there are several processes.
    """
    with needs_extra("extract"):
        from sklearn.cluster import MiniBatchKMeans

    options, output = options or Options(), expand(output)
    if output.suffix != ".npz":
        raise InputError(f"{output}: the name of a k-means model must end in .npz.")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: found {seed}, expected an integer between 0 and 2^32 - 1")
    if not 2 <= units <= MAX_UNITS:
        raise InputError(f"units: found {units}, expected 2 to {MAX_UNITS:,}")
    if max_frames < units:
        raise InputError(f"max_frames: found {max_frames}, expected {units} at least, a frame for each unit")
    check_name(model)
    with environment(options.device) as env:
        if env.world_size > 1:
            raise InputError("k-means runs in one process, which uses all cores")
        found = name_items(find_items(sources), {}, tree=False)
        with Session(model, layer, options, env) as session:
            items, problems = find_lengths(found, options, shortest=session.shortest)
            for name, why in problems.items():
                session.summary.skip(name, why)
            draw = _draw(session, items, max_frames, seed)
            summary = session.summary
            if not draw.drawn:
                reason = next(iter(summary.skipped.values()))
                raise InputError(f"none of {len(found)} recordings could be encoded, the first one for this: {reason}")
            frames = np.concatenate([draw.drawn[item.name][1] for item in items if item.name in draw.drawn])
            if len(frames) < units:
                remedy = f"raise max_frames ({max_frames})" if draw.share < 1 else "give more recordings"
                raise InputError(f"{len(frames)} frames are too few for {units} units: {remedy}")
            logger.info("fitting %d clusters to %d frames", units, len(frames))
            clusters = MiniBatchKMeans(
                units, batch_size=10_000, n_init=5, max_no_improvement=100, reassignment_ratio=0.0, random_state=seed
            ).fit(frames)
            made = {"kind": "kmeans", "spidr": spidr.__version__, **session.settings()}
            made |= {"units": units, "frames": len(frames), "seed": seed}
        make_folder(output.parent)
        with atomic_write(output) as file:
            np.savez(file, centroids=clusters.cluster_centers_.astype(np.float32), made=json.dumps(made))
        summary.report(output, len(found))
        return summary.skipped


def _draw(session: Session, items: Sequence[Item], max_frames: int, seed: int) -> _Draw:
    """Draw frames of the recordings at random."""
    total = sum(session.num_frames(item.num_samples) for item in items)
    check_memory(4 * min(total, max_frames) * session.model.cfg.encoder_embed_dim, f"{max_frames} frames")
    draw = _Draw(max_frames, min(1.0, max_frames / max(1, total)), seed)
    session.encode(items, lambda item, pieces: draw.add(item.name, pieces), "Features")
    draw.reduce()
    return draw
