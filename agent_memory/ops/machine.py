"""The machine as the doctor finds it: asks its files and programs, on Linux and on macOS.

`recorded` holds texts that stand in for a file, by its path, for a program's output, by its command
line, and for a package's version, by "version NAME"; so what one machine said can be looked at on
another.  Main thread.
"""

import importlib.metadata
import os
import resource
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from agent_memory.ops import readings
from agent_memory.ops.readings import Listener, Memory
from agent_memory.processes import command_of, output

CONNECT_S = 1.0
CHIP_IN_CPUINFO = "model name"


class Machine:
    def __init__(
        self, platform: str = sys.platform, recorded: Mapping[str, str] | None = None
    ) -> None:
        self.is_mac = platform == "darwin"
        self._recorded = recorded or {}

    def text(self, path: str) -> str:
        """ "" if it cannot be read."""
        if path in self._recorded:
            return self._recorded[path]
        try:
            return Path(path).read_text("utf-8", "replace")
        except OSError:
            return ""

    def output(self, *command: str) -> str:
        said = self._recorded.get(" ".join(command))
        return output(*command) if said is None else said

    def version(self, package: str) -> tuple[int, ...]:
        """() if it is not installed."""
        try:
            said = self._recorded.get(f"version {package}")
            text = importlib.metadata.version(package) if said is None else said
        except importlib.metadata.PackageNotFoundError:
            return ()
        return tuple(int(part) for part in text.split(".") if part.isdigit())

    @property
    def python(self) -> tuple[int, ...]:
        said = self._recorded.get("version python")
        return tuple(map(int, said.split("."))) if said else tuple(sys.version_info[:3])

    @property
    def chip(self) -> str:
        if self.is_mac:
            return self._sysctl("machdep.cpu.brand_string")
        lines = self.text("/proc/cpuinfo").splitlines()
        names = (line.partition(":")[2] for line in lines if line.startswith(CHIP_IN_CPUINFO))
        return next(names, "").strip()

    @property
    def memory(self) -> Memory | None:
        if self.is_mac:
            total = readings.whole(self._sysctl("hw.memsize"))
            return readings.vm_stat(self.output("vm_stat"), total)
        return readings.meminfo(self.text("/proc/meminfo"))

    @property
    def gpu_bytes(self) -> int | None:
        """What a GPU may use of the memory: as somebody set it, else as macOS does."""
        memory = self.memory
        if memory is None:
            return None
        set_to = readings.whole(self._sysctl("iogpu.wired_limit_mb")) << 20 if self.is_mac else 0
        return set_to or memory.total * 3 // 4

    @property
    def open_files(self) -> int:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return sys.maxsize if soft == resource.RLIM_INFINITY else soft

    def kind_of_disk(self, path: Path) -> str:
        """The file system's name; "" if it is not known."""
        if self.is_mac:
            mounts = readings.macos_mounts(self.output("mount"))
        else:
            mounts = readings.linux_mounts(self.text("/proc/mounts"))
        return readings.kind_at(path.resolve(), mounts)

    def listens(self, host: str, port: int) -> bool:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(CONNECT_S)
            return client.connect_ex((host, port)) == 0

    def listener(self, port: int) -> Listener | None:
        """None also where we may not know, such as another user's."""
        if self.is_mac:
            asked = ("lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc")
            return readings.lsof(self.output(*asked))
        tables = self.text("/proc/net/tcp"), self.text("/proc/net/tcp6")
        inodes = set[str]().union(*(readings.listening_inodes(text, port) for text in tables))
        pid = next((pid for pid in _pids() if _sockets(pid) & inodes), None)
        return Listener(pid, command_of(pid)) if pid is not None else None

    def _sysctl(self, name: str) -> str:
        return readings.sysctl(self.output("sysctl", name)).get(name, "").strip()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _sockets(pid: int) -> set[str]:
    """The inodes of its sockets; none of one that has ended or is another user's."""
    folder = f"/proc/{pid}/fd"
    try:
        links = {_link(f"{folder}/{name}") for name in os.listdir(folder)}
    except OSError:
        return set()
    return {link.removeprefix("socket:[")[:-1] for link in links if link.startswith("socket:[")}


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # closed meanwhile
        return ""
