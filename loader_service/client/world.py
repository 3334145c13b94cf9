"""The rank and the world size of a loader, and evidence that all ranks would get the same data."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from typing import Any, Final, Literal

from loader_service.errors import OptionError

log = logging.getLogger("loader_service.client")

AUTO: Final = "auto"


def this_world(rank: int | Literal["auto"] | None, world_size: int | None) -> tuple[int, int]:
    """Return rank and world size.

    Args:
        rank: as given; ``auto`` finds it, and None is 0.
        world_size: as given; None is what goes with the rank.

    Raises:
        OptionError: they contradict each other or the environment, or each worker of a DataLoader would repeat the data.
    """
    if rank == AUTO:
        rank, size = _found() or (0, 1)
        if world_size not in (None, size):
            raise OptionError("world_size", world_size, f"nothing beside rank='auto', which finds {size}")
        world_size = size
    elif world_size is None:
        if rank:
            raise OptionError("rank", rank, "0 without a world_size, or 'auto'")
        world_size = 1
        if rank is None:  # both left out: someone who gives them means them
            _warn_of_other_ranks()
    _check_workers(world_size)
    return rank or 0, world_size


def check_world(rank: int | Literal["auto"] | None, world_size: int | None, opened_as: tuple[int, int]) -> None:
    """Compare a loader's world, when it begins to deliver, with what a framework has said since it was opened.

    Lightning, for one, starts its processes within ``fit()``, and a Loader that is opened before is each one's rank 0 of 1.

    Args:
        rank: as given to the loader.
        world_size: as given to the loader.
        opened_as: the rank and world size that were found then.

    Raises:
        OptionError: ``rank="auto"`` would find others now.
    """
    if rank == AUTO and (found := _found() or opened_as) != opened_as:
        raise OptionError(
            "rank",
            rank,
            f"a Loader that is opened when the ranks are known: it was opened as rank {opened_as[0]} of {opened_as[1]}, and "
            f"this process is now rank {found[0]} of {found[1]}; open it after the process group is initialised, in Lightning "
            "for instance in train_dataloader()",
        )
    if rank is None and world_size is None:
        _warn_of_other_ranks()


def _warn_of_other_ranks() -> None:
    with suppress(OptionError):  # variables of another program are no evidence
        found = _found()
        if found and found[1] > 1:
            log.warning(
                "this process is rank %d of %d, but its Loader is rank 0 of 1, so that all ranks get the same data: give "
                "rank='auto' to share each epoch out, or rank=0, world_size=1 if the same data is intended.",
                *found,
            )


def _found() -> tuple[int, int] | None:
    """Return the rank and world size that torch.distributed, JAX or the environment states; None if none of them does."""
    # Neither is imported for this: a program without it has no ranks.
    torch_distributed: Any = sys.modules.get("torch.distributed")
    if torch_distributed and torch_distributed.is_available() and torch_distributed.is_initialized():
        return torch_distributed.get_rank(), torch_distributed.get_world_size()
    jax: Any = sys.modules.get("jax")
    if jax and jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:
        return None
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise OptionError(
            "RANK, WORLD_SIZE", f"{rank}, {size}", "numbers, the first below the second, as torchrun sets them"
        )
    return int(rank), int(size)


def _check_workers(world_size: int) -> None:
    """Refuse a loader that each worker of a PyTorch DataLoader opens for itself, with the same data."""
    torch_data: Any = sys.modules.get("torch.utils.data")
    worker = torch_data.get_worker_info() if torch_data else None
    if worker is not None and world_size % worker.num_workers:
        raise OptionError(
            "world_size",
            world_size,
            f"a multiple of the DataLoader's {worker.num_workers} workers, each of which opens a Loader here: loop over the "
            "Loader itself, without a DataLoader, since the node has workers; or use num_workers=0",
        )
