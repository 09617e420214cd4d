"""Processes that start in a moment, and a function in two of them that can communicate, on the CPU."""

import multiprocessing
import socket
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

FORKSERVER = multiprocessing.get_context("forkserver")
"""Imports what they need once for all, where no thread has started yet. Every file of tests has the same one."""
TORCH = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor.parallel")
OTHERS = ("sklearn.datasets", "matplotlib.figure", "av", "soundfile", "pytest")
FORKSERVER.set_forkserver_preload(["m2pt.cli", "m2pt.train.run", *TORCH, *OTHERS])


def free_port():
    """A port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(function, *arguments):
    """What `function(*arguments)` returned in each of them; its error, if it raised one."""
    with TemporaryDirectory() as folder:
        start_processes(_run, (folder, function, arguments), nprocs=2, start_method="forkserver")
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(2)]


def _run(rank, folder, function, arguments):
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(minutes=1), world_size=2, rank=rank)
    torch.save(function(*arguments), Path(folder, str(rank)))
    dist.destroy_process_group()
