"""Train in processes that die by SIGKILL, again and again, until one is let run to its end.

    python tests/killed_runs.py KILLS SEED OUT FLAGS-OF-train.py…

The kills take turns: at a random moment after the next step was saved; just before a random rename,
that is, within a write; just before or after a random file operation (flush, rename, deletion).
Prints how many kills left a temporary file, that is, fell within a write, and how many processes
went on from a step above 0. One parent imports torch once and forks; it computes nothing itself.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402

LONGEST = 0.05  # seconds from a saved step to a kill by the clock
OPERATIONS = ("fsync", "replace", "unlink")
LAST = 40  # file operation of a kill; a start takes about 15, a step as many
LAST_RENAME = 12  # rename of a kill; about a third of the operations are


def die_at(names, operation: int, before: bool) -> None:
    """Kill this process at its operation of that number, of the functions of `os` so named."""
    count = iter(range(1, sys.maxsize))

    def fatal(call):
        def counted(*arguments, **options):
            now = next(count) == operation
            if now and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if now:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return counted

    for name in names:
        setattr(os, name, fatal(getattr(os, name)))


def start(flags, kill=None) -> int:
    """A forked process that trains, silently; → its id."""
    if child := os.fork():
        return child
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    if kill:
        die_at(*kill)
    os._exit(train.main(flags))


def newest(out) -> int:
    """The newest saved step; -1: none."""
    return max((int(path.stem[5:]) for path in out.glob("states/step-*.pt")), default=-1)


def main(kills, seed, out, *flags) -> int:
    """→ exit code of the last process; 9 if one ended before the kill meant for it."""
    chance, out, within_write, went_on = random.Random(int(seed)), Path(out), 0, 0
    for number in range(int(kills) + 1):
        saved = newest(out)
        resume, went_on = saved >= 0, went_on + (saved > 0)
        command = ["--resume", "--out", str(out)] if resume else [
            *flags, "--out", str(out), *["--overwrite"] * out.exists()]
        last, turn = number == int(kills), number % 3
        kill = [(("replace",), chance.randint(1, LAST_RENAME), True), None,
                (OPERATIONS, chance.randint(1, LAST), chance.random() < 0.5)][turn]
        child = start(command, None if last else kill)
        if kill is None and not last:
            while newest(out) <= max(saved, 0) and not os.waitid(
                    os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, LONGEST))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not last and code != -signal.SIGKILL:
            print(f"process {number} ended with code {code} before it was killed")
            return 9
        within_write += any(out.rglob(".*.tmp"))
    print(within_write, went_on)
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
