"""Data parallel on MPI: `mpiexec -n 4 python train_char.py …` trains one model on four processes.

Each process, a rank, runs the whole program on its rows of every batch and its part of every
validation. Gradients are summed over all ranks, so that all make the same step. Rank 0 prints and
writes. MPI starts at the first call of `world`. One rank alone needs no mpi4py.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from grassmann import require

caught: list[int] = []  # signals that this rank has caught
stops: list[int] = []  # signals that all ranks know of; all stop at the same step


@dataclass(frozen=True)
class World:
    """All ranks of a run, and this rank's place among them."""

    cores: int  # for this rank
    size: int = 1
    rank: int = 0
    local_size: int = 1  # ranks on this machine
    local_rank: int = 0
    comm: Any = None  # mpi4py's communicator


def available_cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


@lru_cache
def world() -> World:
    """Started by the mpiexec of Open MPI, MPICH or a relative? Raises UserError without mpi4py."""
    cores = available_cores()
    started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or ""
    if not started.isdecimal() or int(started) <= 1:
        return World(len(cores))
    try:
        from mpi4py import MPI
    except ImportError as error:
        missing = f"mpiexec started {started} processes, but mpi4py does not work here"
        require(False, f"{missing} ({error}): pip install -e '.[mpi]'")
    comm = MPI.COMM_WORLD
    machine = comm.Split_type(MPI.COMM_TYPE_SHARED)
    shared = set().union(*machine.allgather(cores))
    each = max(1, len(shared) // machine.size)
    return World(each, comm.size, comm.rank, machine.size, machine.rank, comm)


def rows(n: int) -> np.ndarray:
    """This rank's rows of a batch of n. Raises UserError if there are more ranks than rows."""
    size = world().size
    too_small = f"a batch of {n} is too small for {size} processes"
    require(n >= size, f"{too_small}: raise --batch-size to {size} or more")
    return np.array_split(np.arange(n), size)[world().rank]


def stop_if(signals: float) -> None:
    """Stop if any rank has caught a signal.

    All ranks call this, with the same sum of caught signals.
    """
    if signals and not stops:
        stops.append(caught[0] if caught else 15)  # SIGTERM


def add_up(loss: float, grads: dict) -> tuple[float, dict]:
    """Loss and gradients, summed over all ranks.

    The number of caught signals is summed with them.
    """
    comm = world().comm
    if comm is None:
        return loss, grads
    arrays = [g.ravel() for g in grads.values()]
    flat = np.concatenate([*arrays, [loss, len(caught)]], dtype=grads["E"].dtype)
    total = np.empty_like(flat)
    comm.Allreduce(flat, total)
    stop_if(total[-1])
    ends = np.cumsum([g.size for g in grads.values()])
    parts = np.split(total, ends)
    summed = {
        name: part.reshape(g.shape) for (name, g), part in zip(grads.items(), parts, strict=False)
    }
    return total[-2], summed


def shared_map(function: Callable, chunks: list, run: Callable) -> Iterator:
    """Yields function(chunk), a number, for each chunk, until a signal.

    Each rank computes a part of them.
    """
    comm, size, rank = world().comm, world().size, world().rank
    if comm is None:
        for number in run(function, chunks):
            yield number
            if stops:
                break
    else:
        mine = [float(number) for number in run(function, chunks[rank::size])]
        every = comm.allgather([*mine, len(caught)])
        stop_if(sum(part[-1] for part in every))
        for k in range(len(chunks)):
            yield every[k % size][k // size]


@contextmanager
def together() -> Iterator[None]:
    """Only rank 0 prints to standard output, and an error in one rank ends all ranks."""
    if world().rank > 0:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        yield
    except BaseException as end:
        if world().comm is not None:
            from mpi4py.run import set_abort_status

            if stops:  # all ranks arrive here, and the first to end would end the others
                world().comm.Barrier()
            set_abort_status(end)
        raise
