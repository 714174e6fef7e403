"""Data parallel on MPI: `mpiexec -n 4 python train_char.py …` trains one model on four processes.

Every process (MPI calls it a rank) runs the whole program, on its rows of each batch and its part of
a validation. Gradients and losses are added up over all ranks, so that all take the same steps; the
first one prints and writes. Without mpiexec there is one rank, and mpi4py is not needed. With --gpu
each rank has a card of its machine and NCCL adds up: what is for cards here has never run on any.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np

from cli import available_cores

size = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)
rank, local_size, cores = 0, 1, len(available_cores())  # local_size: so many on this machine
caught, stops = [], []  # signals: of this rank, of any
if size > 1:  # Open MPI has started this process, or MPICH or a relative of it
    known = "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"
    local_rank = int(next(filter(None, map(os.environ.get, known)), 0))
    cards = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))] or range(local_rank + 1)
    os.environ["CUDA_VISIBLE_DEVICES"] = str(cards[local_rank % len(cards)])  # before MPI starts: it may touch one

    from mpi4py import MPI

    comm, machine = MPI.COMM_WORLD, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    rank, local_size = comm.rank, machine.size
    shared = set().union(*machine.allgather(available_cores()))  # each may be bound to its own
    cores = max(1, len(shared) // local_size)

@cache
def nccl() -> object:
    """A `cupyx.distributed.NCCLBackend` of all ranks."""
    from cupyx.distributed import init_process_group

    return init_process_group(size, rank, use_mpi=True)

def rows(n: int) -> np.ndarray:
    """Which of the n rows of a batch are this rank's. Raises ValueError if there are too few."""
    if n < size:
        raise ValueError(f"a batch of {n} is too small for {size} processes: each needs a row")
    return np.array_split(np.arange(n), size)[rank]

def add_up(loss: float, grads: dict) -> tuple[float, dict]:
    """The sums of both over all ranks. Whether one has caught a signal goes along."""
    if size == 1:
        return loss, grads
    if hasattr(grads, "buffer"):  # gpu.Flat
        for array in (loss, grads.buffer):
            nccl().all_reduce(array, array)
        stop_if(comm.allreduce(len(caught)))
        return loss, grads
    arrays = list(grads.values())
    flat = np.concatenate([*(g.ravel() for g in arrays), [loss, len(caught)]], dtype=arrays[0].dtype)
    comm.Allreduce(MPI.IN_PLACE, flat)
    stop_if(flat[-1])
    parts = np.split(flat[:-2], np.cumsum([g.size for g in arrays])[:-1])
    return flat[-2], {k: part.reshape(grads[k].shape) for k, part in zip(grads, parts, strict=True)}

def each(function: Callable, chunks: list, run: Callable) -> Iterable:
    """run(function, chunks), as of map; each rank does its part, and the results are numbers."""
    if size == 1:
        return run(function, chunks)
    own = [float(number) for number in run(function, chunks[rank::size])]
    every = comm.allgather([*own, len(caught)])
    stop_if(sum(part[-1] for part in every))
    return [every[k % size][k // size] for k in range(len(chunks))]

def stop_if(signals: float) -> None:
    """All ranks note it at the same point of the run if any has caught a signal."""
    if signals and not stops:
        stops.append(caught[0] if caught else signal.SIGTERM)

def agreed(signals: list[int]) -> list[int]:
    """Of the list that this rank's signals go to, the one that is the same on all ranks."""
    global caught
    caught = signals
    return signals if size == 1 else stops

def first(function: Callable) -> Callable:
    """For what writes: the other ranks leave it out."""
    return (lambda *args, **how: None) if rank else function

@contextmanager
def together() -> Iterator[None]:
    """Within the `with` block: what ends one rank ends all, and only the first one prints.

    But for an error: the others give the first one time to say the same, then say it and end all.
    """
    if rank:
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in "oe")
    try:
        yield
    except BaseException as end:
        code = getattr(end, "code", 1)
        if size == 1 or not code:
            raise
        if not isinstance(end, SystemExit):
            sys.excepthook(type(end), end, end.__traceback__)
        if stops:  # all come here
            comm.Barrier()
            sys.exit(0 if rank else code)
        time.sleep(3 if rank else 0)
        os.write(2, sys.stderr.buffer.getvalue() if rank else b"")
        time.sleep(0.5)  # Open MPI's mpiexec drops what it has not read yet
        comm.Abort(code)
