"""Work on the images of a batch one at a time, on CPUs: as many at once as there are threads.

A layer whose threads share one feature map has each read what the other has just written, from another cache on
processors that have several; threads with an image each don't.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def image_by_image(work: Callable[..., Result], most: int, *batches: Tensor | None) -> list[Result]:
    """``work`` of each image, whose tensors have a first side of 1; ``batches``: [B, ...] each, or None, which stays.

    ``most``: how many may go at once. With gradients, or fewer images or fewer allowed than there are threads, one goes
    after the other, and each has all threads. While several do, whoever else uses torch in this process has fewer.
    """
    number = next(len(batch) for batch in batches if batch is not None)
    rows = [tuple(batch if batch is None else batch[row : row + 1] for batch in batches) for row in range(number)]
    threads = torch.get_num_threads()
    at_once = number // threads * threads  # each whole round of them; what is left over has all threads
    if threads == 1 or threads > most or torch.is_grad_enabled():
        at_once = 0
    return [*_in_threads(work, rows[:at_once], threads), *(work(*row) for row in rows[at_once:])]


def _in_threads(work: Callable[..., Result], rows: list[tuple[Any, ...]], threads: int) -> list[Result]:
    if not rows:
        return []
    without_gradients = torch.no_grad()(work)  # what a new thread doesn't inherit
    try:
        with ThreadPoolExecutor(threads, "image", torch.set_num_threads, (1,)) as pool:
            return list(pool.map(lambda row: without_gradients(*row), rows))
    finally:
        torch.set_num_threads(threads)  # which in some of torch's libraries is the whole process's
