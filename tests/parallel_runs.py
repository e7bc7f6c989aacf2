"""Run functions in several processes of one group, without waiting for torch to start in each.

    python tests/parallel_runs.py JSON

JSON: a list of runs, one after the other, each [number of processes, [flags of train.py…]]; with
--second-base DIR the second process has other weights; instead of flags: ["step", base, folder], one
step of `test_distributed.one_step`, its results in folder/RANK.pt. Prints the exit codes of each
run's processes as JSON. One parent imports torch once and forks; it computes nothing itself.
"""

import json
import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import train  # noqa: E402
from pixcell_min.distributed import joined  # noqa: E402
from test_distributed import one_step  # noqa: E402


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_processes(size: int, act) -> list[int]:
    """`act(rank)` in `size` forked processes with torchrun's environment; → exit codes, by rank."""
    port, children = free_port(), []
    for rank in range(size):
        if not (child := os.fork()):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 99
            try:
                code = act(rank)
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def work(flags, rank) -> int:
    """What one process of a run does."""
    if flags[0] == "step":
        with joined("cpu") as processes:
            torch.save(one_step(Path(flags[1]), processes), Path(flags[2]) / f"{rank}.pt")
        return 0
    if "--second-base" in flags:
        at = flags.index("--second-base")
        flags = [*flags[:at], *["--base", flags[at + 1]] * rank, *flags[at + 2:]]
    return train.main(flags)


def main(runs) -> None:
    """Run them all; print the exit codes."""
    print(json.dumps([in_processes(size, lambda rank: work(flags, rank))
                      for size, flags in json.loads(runs)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
