"""Notices that a process of a run is gone, although nothing fails: NCCL's collectives may wait for it without an end.

Every process counts up a number in the store through which the processes found each other. The first process watches
all numbers, and the others watch the first one's. Whoever's number stands still for too long is lost. The first process
writes that into the store, so that all processes name the same one.
"""

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store, TCPStore

INTERVAL = 1.0
"""Seconds between two beats."""
PATIENCE = 30
"""Beats that a process may miss. A beat needs nothing but Python's interpreter lock and the network for a moment, so
evaluating, saving or compiling doesn't delay it."""
TIMEOUT = timedelta(seconds=10)
"""Of one exchange with the store."""


def open_store() -> Store:
    """A connection of this thread's own to the store of the process group; the group's own may be busy for minutes.

    Raises:
        RuntimeError: the store can't be reached.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # set by torchrun, or else by Fabric
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)


class Heartbeat:
    """This process's part in the watch: from `start` until `stop`, it shows that it is alive, and watches others.

    A process is watched from the moment its number moves, so one that comes late is not lost. One that has stopped its
    own heartbeat is taken for lost as long as others go on: all processes of a run leave it at the same time. Silence
    is counted in beats of this process, so no one is lost if all processes are suspended for a while.

    Args:
        rank: number of this process among all.
        world_size: number of all processes.
        lost: called once, by a thread, with a line about the process that is lost.
        connect: opens the store.
        failure: a failure that this process has noticed itself, or ''. With one, it stops counting, and `lost` is
            called at once.
        interval: seconds between two beats.
        patience: beats that a process may miss.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        lost: Callable[[str], None],
        connect: Callable[[], Store] = open_store,
        failure: Callable[[], str] = str,
        interval: float = INTERVAL,
        patience: int = PATIENCE,
    ):
        self.rank, self.world_size = rank, world_size
        self.lost, self.connect, self.failure = lost, connect, failure
        self.interval, self.patience = interval, patience
        self.watched = [peer for peer in range(world_size) if peer != rank] if rank == 0 else [0]
        self.beats: dict[int, int] = {}
        self.silence: dict[int, int] = {}
        self.hosts: dict[int, str] = {}
        self.verdict = ""
        self._prefix = f"fastmae/heartbeat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._stopped = threading.Event()
        # Two threads, since an exchange with a store whose process is gone may itself take long.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._exchange, self._watch)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End. The process then says nothing about itself, and notices nothing."""
        self._stopped.set()

    def _exchange(self) -> None:
        try:
            store = self.connect()
            store.set(self._key("host", self.rank), socket.gethostname())
            while not self._stopped.is_set():
                self._beat(store)
                self._stopped.wait(self.interval)
        except RuntimeError:
            return  # the store is gone, and its process too; `_watch` counts how long nothing has been heard

    def _beat(self, store: Store) -> None:
        if self.rank == 0:
            if self.verdict:
                store.set(self._key("verdict"), self.verdict)
        elif store.check([self._key("verdict")]):
            self.verdict = store.get(self._key("verdict")).decode()
        if self.failure():
            return
        store.add(self._key("beat", self.rank), 1)
        for peer in self.watched:
            beats = store.add(self._key("beat", peer), 0)
            if beats != self.beats.get(peer, beats):
                self.silence[peer] = 0
                if peer not in self.hosts and store.check([self._key("host", peer)]):
                    self.hosts[peer] = store.get(self._key("host", peer)).decode()
            self.beats[peer] = beats

    def _watch(self) -> None:
        while not self._stopped.wait(self.interval):
            line = self.failure() or self.verdict or self._silent_peer()
            if not line:
                continue
            if self.rank == 0:  # which may hold the store: the others shall read the line before it ends
                self.verdict = line
                self._stopped.wait(3 * self.interval)
            if not self._stopped.is_set():
                self.lost(line)
            return

    def _silent_peer(self) -> str:
        """A line about the process that has been silent the longest, if it is lost; else ''."""
        for peer in list(self.silence):
            self.silence[peer] += 1
        peer = max(self.silence, key=self.silence.__getitem__, default=self.rank)
        if peer == self.rank or self.silence[peer] <= self.patience:
            return ""
        host = f" (on {self.hosts[peer]})" if peer in self.hosts else ""
        seconds = self.silence[peer] * self.interval
        return (
            f"process {peer + 1} of {self.world_size}{host} has not been heard of for {seconds:.0f} s: "
            "it has ended, hangs, or can't be reached"
        )

    def _key(self, kind: str, rank: int | str = "") -> str:
        return f"{self._prefix}/{kind}/{rank}"
