"""Data parallel on MPI: `mpiexec -n 4 python train_char.py …` trains one model on four processes.

Each process, a rank, runs the whole program on its rows of every batch and its part of every
validation. Gradients are summed over all ranks, so that all make the same step. Rank 0 prints and
writes. One rank alone needs no mpi4py.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from grassmann import require


def available_cores() -> set[int]:
    """The cores that this process may use."""
    return (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )


size, rank, local_size, local_rank, cores = (
    1,
    0,
    1,
    0,
    len(available_cores()),
)  # local: on this machine
started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or ""
if started.isdecimal() and int(started) > 1:  # by the mpiexec of Open MPI, MPICH or a relative
    from mpi4py import MPI
    from mpi4py.run import set_abort_status

    comm, machine = MPI.COMM_WORLD, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    size, rank, local_size, local_rank = comm.size, comm.rank, machine.size, machine.rank
    cores = max(1, len(set().union(*machine.allgather(available_cores()))) // local_size)
caught, stops = (
    [],
    [],
)  # signals: caught by this rank; known to all ranks, which stop at the same step


def rows(n: int) -> np.ndarray:
    """This rank's rows of a batch of n. Raises UserError if there are more ranks than rows."""
    require(
        n >= size,
        f"a batch of {n} is too small for {size} processes: raise --batch-size to {size} or more",
    )
    return np.array_split(np.arange(n), size)[rank]


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
    if size == 1:
        return loss, grads
    flat = np.concatenate(
        [*(g.ravel() for g in grads.values()), [loss, len(caught)]], dtype=grads["E"].dtype
    )
    comm.Allreduce(MPI.IN_PLACE, flat)
    stop_if(flat[-1])
    parts = iter(np.split(flat, np.cumsum([g.size for g in grads.values()])))
    return flat[-2], {name: next(parts).reshape(g.shape) for name, g in grads.items()}


def shared_map(function: Callable, chunks: list, run: Callable) -> Iterator:
    """Yields function(chunk), a number, for each chunk, until a signal.

    Each rank computes a part of them.
    """
    if size > 1:
        every = comm.allgather([*map(float, run(function, chunks[rank::size])), len(caught)])
        stop_if(sum(part[-1] for part in every))
        yield from (every[k % size][k // size] for k in range(len(chunks)))
    else:
        for number in run(function, chunks):
            yield number
            if stops:
                break


@contextmanager
def together():
    """Within the `with` block, only rank 0 prints to standard output, and an error in one rank
    ends all ranks."""
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end)
    try:
        yield
    except BaseException as end:
        if size > 1:
            if (
                stops
            ):  # all ranks arrive here; without a barrier, the first to end would end the others
                comm.Barrier()
            set_abort_status(end)
        raise
