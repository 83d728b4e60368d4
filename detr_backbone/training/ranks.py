"""The processes of one run: they agree before every step, and end together where one of them is gone.

Collectives wait for every process, and a process that raised, was killed or stands still never comes. So each process
tells the next one every second, on a channel of its own, that it lives; where one does not, all end with one message.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from detr_backbone.errors import DistributedError

if TYPE_CHECKING:
    from accelerate import Accelerator

SILENCE = 20.0  # seconds without a sign of life after which a process counts as gone
_BEAT, _PATIENCE = 1.0, timedelta(seconds=10)
_FAILED = "failed"
_LOST = (
    "Timed out",
    "timed out",
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Socket Timeout",
    "remote worker",
)


class Ranks:
    """What a process of a run knows of the others; with one process, nothing costs anything.

    Args:
        accelerator: has joined the processes.
        timeout: seconds after which a collective that some process never joins is an error.
    """

    def __init__(self, accelerator: "Accelerator", *, timeout: int) -> None:
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        self._closing = threading.Event()
        self._group: distributed.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        if self.count > 1:  # of its own, on the CPU: agreeing does not wait for a device
            self._group = _own_group(timeout)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Begin and end with the other processes: an error in one of them ends all, with the message of the first.

        Raises:
            DistributedError: another process ended, or no longer answers.
        """
        try:
            yield
            self.close()
        except BaseException as error:
            lost = self.count > 1 and isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST)
            if lost and self._others_failed():
                raise SystemExit(1) from error
            self.fail()
            if lost:
                raise DistributedError(
                    f"another process of the run ended or does not answer | where: rank={self.rank} | "
                    f"got {str(error).splitlines()[0]}"
                ) from error
            raise

    def refuse_differences(self, identity: Mapping[str, str]) -> None:
        """Compare what must be the same in every process, such as configuration and data, in all of them.

        Args:
            identity: name -> text, with the same names in every process.

        Raises:
            DistributedError: a process differs; names what, and in which process.
        """
        if self.count == 1:
            return
        hashes = [list(hashlib.sha256(text.encode()).digest()) for text in identity.values()]
        mine = torch.tensor(hashes, dtype=torch.uint8)
        every = [torch.empty_like(mine) for _ in range(self.count)]
        distributed.all_gather(every, mine, group=self._group)
        for rank, theirs in enumerate(every):
            different = [name for name, same in zip(identity, (theirs == every[0]).all(1), strict=True) if not same]
            if different:
                raise DistributedError(
                    f"processes of one run must be given the same | where: rank={rank} key={different[0]} | got "
                    "another one than rank 0 | fix: the same configuration and the same files on every machine"
                )

    def agree(self, *flags: bool) -> list[bool]:
        """Return for each flag whether any process raised it, the same in all of them."""
        if self.count == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in raised]

    def watch(self) -> None:
        """Begin to watch the other processes, until `close` or `fail`."""
        if self.count == 1:
            return
        host = os.environ["MASTER_ADDR"]
        port = torch.zeros(1, dtype=torch.int64)
        if self.rank == 0:
            store = TCPStore(host, 0, self.count, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
            port[0] = store.port
        distributed.broadcast(port, 0, group=self._group)
        if self.rank > 0:
            store = TCPStore(host, int(port), self.count, wait_for_workers=False, timeout=_PATIENCE)
        self._store = store
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def fail(self) -> None:
        """Let the other processes end: this one raised an error, which is the message."""
        if self._thread is not None and not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            self._store.set(_FAILED, "1")
            time.sleep(2 * _BEAT)  # the first process holds the channel: let the others read it

    def close(self) -> None:
        """Stop watching, in all processes together."""
        if self._thread is not None and not self._closing.is_set():
            self._closing.set()
            distributed.barrier(group=self._group)
            self._thread.join()

    def _others_failed(self) -> bool:
        """Return whether another process has said that it failed: then the message is its own."""
        if self._thread is None:
            return False
        time.sleep(2 * _BEAT)  # the watch ends this process if that is so
        return not self._thread.is_alive()

    def _watch(self) -> None:
        watched = (self.rank + 1) % self.count
        last, since = -1, time.monotonic()
        while not self._closing.wait(_BEAT):
            try:
                self._store.add(f"beat {self.rank}", 1)
                beats = self._store.add(f"beat {watched}", 0)
                failed = self._store.check([_FAILED])
            except Exception:  # whatever it is, the process that holds the channel does not answer
                if not self._closing.is_set():
                    _end(f"rank 0 does not answer rank {self.rank}: it ended or stands still")
                return
            if failed:
                _end("")
            if beats != last:
                last, since = beats, time.monotonic()
            elif time.monotonic() - since > SILENCE and not self._closing.is_set():
                self._store.set(_FAILED, "1")
                _end(f"rank {watched} gave no sign of life for {SILENCE:g} seconds: it ended or stands still")


def _own_group(timeout: int) -> "distributed.ProcessGroup":
    group: Any = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return group


def _end(message: str) -> None:
    """End this process at once, whatever it waits for."""
    if message:
        print(
            f"error: a process of the run is gone | where: {message} | fix: --resume auto", file=sys.stderr, flush=True
        )
    os._exit(1)
