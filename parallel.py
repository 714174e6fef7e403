"""Data parallel on MPI: `mpiexec -n 4 python train_char.py …` trains one model on four processes.

Each process (a rank) runs the whole program, on its rows of every batch and its part of a validation. Sums over
all ranks keep their steps equal; rank 0 prints and writes. Without mpiexec there is one rank, and no mpi4py.
"""
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from grassmann import check

def available_cores() -> set[int]:
    """The cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))

size, rank, local_size, local_rank, cores = 1, 0, 1, 0, len(available_cores())  # local: on this machine
started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or ""
if started.isdecimal() and int(started) > 1:  # by Open MPI's mpiexec, or that of MPICH or a relative
    from mpi4py import MPI
    from mpi4py.run import set_abort_status

    comm, machine = MPI.COMM_WORLD, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    size, rank, local_size, local_rank = comm.size, comm.rank, machine.size, machine.rank
    cores = max(1, len(set().union(*machine.allgather(available_cores()))) // local_size)
caught, stops = [], []  # signals: of this rank; known to all ranks, which stop at the same step

def rows(n: int) -> np.ndarray:
    """Which of the n rows of a batch are this rank's. Raises UserError if there are too few."""
    check(n >= size, f"a batch of {n} is too small for {size} processes: each needs a row")
    return np.array_split(np.arange(n), size)[rank]

def stop_if(signals: float) -> None:
    """Called by all ranks with the same number: of the signals that any has caught."""
    if signals and not stops:
        stops.append(caught[0] if caught else 15)  # SIGTERM

def add_up(loss: float, grads: dict) -> tuple[float, dict]:
    """The sums of both over all ranks. Whether one has caught a signal goes along."""
    if size == 1:
        return loss, grads
    flat = np.concatenate([*(g.ravel() for g in grads.values()), [loss, len(caught)]], dtype=grads["E"].dtype)
    comm.Allreduce(MPI.IN_PLACE, flat)
    stop_if(flat[-1])
    parts = iter(np.split(flat, np.cumsum([g.size for g in grads.values()])))
    return flat[-2], {name: next(parts).reshape(g.shape) for name, g in grads.items()}

def shared_map(function: Callable, chunks: list, run: Callable) -> Iterator:
    """run(function, chunks), as of map, until a signal; each rank does its part, and results are numbers."""
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
    """Within the `with` block: only rank 0 prints to the standard output, and what ends one rank ends all."""
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (to the end)
    try:
        yield
    except BaseException as end:
        if size > 1:
            if stops:  # all ranks come here, and the first that ends would end the others
                comm.Barrier()
            set_abort_status(end)
        raise
