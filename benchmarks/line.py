"""A line of a given bandwidth and delay between this machine and a network namespace of it. Linux, as root.

Two TUN devices, one on each side; a process takes whole packets from one and puts them into the other when the line
has room and the delay is over. TCP above it is the kernel's own. Delay needs no queueing discipline, which not every
kernel has.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

HERE, THERE = "10.77.0.1", "10.77.0.2"
NAMESPACE = "twist-fl-line"
_MTU = 65_000
_QUEUE_BYTES = 16_000_000
"""What waits for the line; more is dropped, as by a switch."""
_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001


@contextmanager
def line(bits_per_second: float, delay: float) -> Iterator[list[str]]:
    """The words before a command that run it at the other end, THERE; this end is HERE.

    `delay` in seconds, one way. Raises CalledProcessError or PermissionError without root.
    """
    subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
    inside = ["ip", "netns", "exec", NAMESPACE]
    words = [sys.executable, __file__, str(bits_per_second), str(delay)]
    carrier = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert carrier.stdout is not None
        carrier.stdout.readline()  # both devices are there
        subprocess.run(["ip", "link", "set", "twist1", "netns", NAMESPACE], check=True)
        for prefix, address, device in (([], HERE, "twist0"), (inside, THERE, "twist1")):
            subprocess.run([*prefix, "ip", "address", "add", f"{address}/24", "dev", device], check=True)
            subprocess.run([*prefix, "ip", "link", "set", device, "mtu", str(_MTU), "up"], check=True)
        subprocess.run([*inside, "ip", "link", "set", "lo", "up"], check=True)
        yield inside
    finally:
        carrier.terminate()
        carrier.wait()
        subprocess.run(["ip", "netns", "delete", NAMESPACE], check=True)


def _device(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN_WITHOUT_HEADER))
    return descriptor


class _Way:
    """One direction."""

    def __init__(self, source: int, target: int, bits_per_second: float, delay: float) -> None:
        self.source, self.target, self.rate, self.delay = source, target, bits_per_second / 8, delay
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.come = threading.Semaphore(0)
        for work in (self._take, self._give):
            threading.Thread(target=work, daemon=True).start()

    def _take(self) -> None:
        free = 0.0  # when the line has sent all before
        while True:
            packet = os.read(self.source, _MTU + 100)
            now = time.monotonic()
            if (free - now) * self.rate > _QUEUE_BYTES:
                continue
            free = max(free, now) + len(packet) / self.rate
            self.waiting.append((free + self.delay, packet))
            self.come.release()

    def _give(self) -> None:
        while True:
            self.come.acquire()
            due, packet = self.waiting.popleft()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                os.write(self.target, packet)
            except OSError:  # the device is not up yet, or no longer
                continue


def main() -> None:
    bits_per_second, delay = map(float, sys.argv[1:])
    ends = [_device("twist0"), _device("twist1")]
    for source, target in (ends, reversed(ends)):
        _Way(source, target, bits_per_second, delay)
    print("ready", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
