"""An endless stream of shuffled batches that can start anywhere.

Image p of the stream belongs to epoch p // n and is image permutation(seed, epoch)(p % n). Step s
takes images [s B, (s + 1) B), rank r of R the r-th of R equal slices of them: what is drawn does
not depend on how many processes share it, and to resume is to ask for a later step.

Shapes: B = batch_size over all ranks, R ranks, C H W a latent.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from remixdit.data.order import permuted
from remixdit.data.shards import ShardDataset

__all__ = ["Batch", "Loader", "check_batch_size"]

Made = TypeVar("Made")

NUM_AHEAD = 3  # batches made while the network runs


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step."""

    latents: Tensor
    """(B / R, C, H, W) float32."""
    class_labels: Tensor
    """(B / R,) int64 in [0, num_classes]."""
    positions: Tensor
    """(B / R,) int64 in [0, B): the place of each image in the batch of all ranks."""


class Loader:
    """Batches of a data set, as a pure function of (seed, step)."""

    def __init__(
        self,
        dataset: ShardDataset,
        batch_size: int,
        *,
        seed: int = 0,
        mirror: bool = False,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        check_batch_size(batch_size, num_ranks)
        dataset.check_mirror(mirror)
        self.dataset, self.batch_size, self.seed, self.mirror = dataset, batch_size, seed, mirror
        share = batch_size // num_ranks
        self.positions = np.arange(rank * share, (rank + 1) * share)

    def batch(self, step: int) -> Batch:
        """Return this rank's share of a step (0, 1, ...)."""
        epochs, indices = self._drawn(step, self.positions)
        latents, labels = self.dataset.read(indices, epochs, self.seed, mirror=self.mirror)
        return Batch(latents, labels, torch.from_numpy(self.positions.copy()))

    def indices(self, step: int, positions: np.ndarray) -> np.ndarray:
        """Return the images at the given places of the batch of all ranks."""
        return self._drawn(step, positions)[1]

    def _drawn(self, step: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epochs, places = np.divmod(step * self.batch_size + positions, len(self.dataset))
        return epochs, permuted(places, len(self.dataset), self.seed, epochs)

    def batches(self, first_step: int, make: Callable[[int, Batch], Made]) -> Iterator[Made]:
        """Yield what `make` returns for (step, batch) of `first_step`, `first_step + 1`, ...

        Both batch and what is made of it are made ahead, in a thread.
        """
        pending: deque[Future[Made]] = deque()
        # One thread: two would spend their time handing the interpreter lock to and fro.
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            step = first_step
            while True:
                while len(pending) < NUM_AHEAD:
                    pending.append(pool.submit(lambda s: make(s, self.batch(s)), step))
                    step += 1
                yield pending.popleft().result()


def check_batch_size(batch_size: int, num_ranks: int) -> None:
    """Refuse a batch that cannot be shared equally."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size % num_ranks:
        raise ValueError(
            f"batch_size must be a multiple of the {num_ranks} processes, got {batch_size}"
        )
