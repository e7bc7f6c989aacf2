"""Several processes, on one machine or more, that share the micro-steps of one run.

    torchrun --nproc-per-node=2 train.py …

Micro-step k of a step goes to process k mod W, and gradients are averaged by PyTorch's
DistributedDataParallel: the global batch, and every number drawn for it, is that of one process.
Process 0 alone writes the run's folder; the others get what it measured or read. Between processes
go tensors and plain data, no code.
"""

import io
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=7)  # others encode 100,000 tiles, say; torchrun ends all if one fails
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "DistBackendError",
        "DistStoreError", "DistNetworkError")


class _Loss(torch.nn.Module):
    """A loss and the parameters it trains, as a module: what DistributedDataParallel wraps."""

    def __init__(self, loss_of, parameters):
        super().__init__()
        self.loss_of, self.parameters_of_loss = loss_of, torch.nn.ParameterList(parameters)

    def forward(self, batch):
        return self.loss_of(batch)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is; alone by default."""

    rank: int = 0  # in [0, size)
    local_rank: int = 0  # of those on this machine
    size: int = 1  # W

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def by_first(self, act):
        """`act` in process 0, in the others a function that does nothing."""
        return act if self.is_first else lambda *_: None

    def device(self, name: str) -> str:
        """The device setting of this process: of several, each takes its own CUDA card.

        Raises: ValueError for one card asked of several processes.
        """
        if self.size == 1:
            return name
        if name.startswith("cuda:"):
            raise ValueError(f"device {name}: one card for {self.size} processes; expected auto, "
                             "cuda or cpu: each process takes a card of its own")
        cuda = name == "cuda" or name == "auto" and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if cuda else name

    def parallel(self, loss_of, parameters):
        """`loss_of`(batch), its gradients for these parameters averaged over the processes."""
        return loss_of if self.size == 1 else DistributedDataParallel(_Loss(loss_of, parameters))

    def apart(self, loss_of):
        """Context of a backward whose gradients wait, to be averaged with a later one's."""
        return nullcontext() if self.size == 1 else loss_of.no_sync()

    def mean(self, value: float) -> float:
        """The mean of a float64 number over the processes."""
        return self._reduced(value, dist.ReduceOp.SUM) / self.size

    def highest(self, value: int) -> int:
        """The highest of a whole number over the processes."""
        return int(self._reduced(value, dist.ReduceOp.MAX))

    def _reduced(self, value, how):
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, how)
        return tensor.item()

    def from_first(self, make):
        """What `make()` gives in process 0, at all of them: nested dicts, lists, numbers, tensors.

        Tensors arrive on the CPU. The other processes do not call `make`.
        """
        if self.size == 1:
            return make()
        message = [None]
        if self.is_first:
            torch.save(value := make(), content := io.BytesIO())
            message = [content.getvalue()]
        dist.broadcast_object_list(message, src=0)
        return value if self.is_first else torch.load(
            io.BytesIO(message[0]), map_location="cpu", weights_only=True)

    def require_equal(self, identity: dict) -> None:
        """Raises: ValueError in all processes if one has not what process 0 has, {name: text}."""
        differing = [f"{name} is {identity[name]}, in process 0 {text}" for name, text in
                     self.from_first(lambda: identity).items() if identity[name] != text]
        if self.highest(len(differing)):
            what = "; ".join(differing) or "another one differs"
            raise ValueError(f"process {self.rank}: {what}; give all "
                             "machines the same weights, tiles and settings")

    @contextmanager
    def one_first(self):
        """The block runs in one process of a machine, then in its others: they find its files."""
        if self.local_rank:
            self._wait()
        yield
        if not self.local_rank:
            self._wait()

    def _wait(self):
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str):
    """The processes that torchrun's environment variables describe; without them: alone.

    Raises: ValueError if one of them is missing, or a machine has more processes than CUDA cards.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Processes()
        return
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is "
                         "not set; start with torchrun, or unset WORLD_SIZE")
    processes = Processes(*(int(os.environ[name]) for name in names[:3]))
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda and processes.local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {processes.local_rank} of this machine has no CUDA card; there "
                         f"are {torch.cuda.device_count()}: start torchrun with as many processes")
    if cuda:
        torch.cuda.set_device(processes.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    yield processes
    dist.barrier()  # torchrun ends all when one ends by a signal: not before the first has saved
    dist.destroy_process_group()  # not after an error: it would wait for the others


def lost(error) -> bool:
    """Whether this process failed only because another one of the run had."""
    return any(word in f"{type(error).__name__}: {error}" for word in LOST)
