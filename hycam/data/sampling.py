"""The order of training rows: processes, workers and resumes don't change it.

It follows from seed and epoch alone; grouped by length, from the number of rows a step too.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class EpochSampler(Sampler[int]):
    """Every row once an epoch, shuffled anew in each.

    accelerate's own sampler loses the epoch where several processes resume in the middle of one.

    Args:
        num_rows: how many rows there are.
        seed: of all epochs' orders.
        epoch: tells the epoch when one begins.
        lengths: tokens per row, to put rows of similar length into a group; None for plain shuffling.
        group_size: rows in a group: all that the processes take in one step.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: Sequence[int] | None = None,
        group_size: int = 1,
    ) -> None:
        self.num_rows = num_rows
        self.seed = seed
        self.epoch = epoch
        self.lengths = lengths
        self.group_size = group_size

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        # of seed + epoch, one seed's second epoch would be the next seed's first
        digest = hashlib.sha256(f"{self.seed} {self.epoch()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]))
        if self.lengths is None:
            return iter(torch.randperm(self.num_rows, generator=generator).tolist())
        return iter(get_length_grouped_indices(self.lengths, self.group_size, generator=generator))


def mix_tasks(datasets: Sequence[Dataset], temperature: float, seed: int) -> Dataset:
    """The tasks' rows with task t at a share proportional to ``rows_t ** (1 / temperature)``.

    At 1 these are all rows, each once. Above, rows are drawn until each has come at least once: the smaller a task,
    the more often its rows come. The draws follow from `seed`.
    """
    if temperature == 1:
        return concatenate_datasets(list(datasets))
    weights = torch.tensor([len(dataset) for dataset in datasets], dtype=torch.float64) ** (1 / temperature)
    return interleave_datasets(
        list(datasets),
        probabilities=(weights / weights.sum()).tolist(),
        seed=seed,
        stopping_strategy="all_exhausted",
    )
