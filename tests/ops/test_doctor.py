"""The doctor: nothing wrong on a healthy machine, and of one thing wrong exactly that."""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent_memory import builtin, config, keys
from agent_memory.metrics import Metrics
from agent_memory.model_source import parse
from agent_memory.ops import blas
from agent_memory.ops.checks import CHECKS, Case, Finding, Level
from agent_memory.ops.doctor import examine, tell_wired
from agent_memory.ops.machine import Machine
from agent_memory.ops.service import Launchd, Systemd
from agent_memory.store.block_store import BlockStore
from agent_memory.store.starts import Starts
from agent_memory.store.state_dir import StateDir
from tests.ops import machines

VERSIONS = {"version python": "3.11.7", "version mlx": "0.32.4", "version mlx-lm": "0.32.2"}
LINUX = {
    **VERSIONS,
    "/proc/meminfo": machines.MEMINFO,
    "/proc/mounts": machines.MOUNTS_LINUX,
    "/proc/cpuinfo": "processor\t: 0\nmodel name\t: Some CPU\n",
}
MAC = {
    **VERSIONS,
    **machines.SYSCTL,
    "vm_stat": machines.VM_STAT_16K,
    "mount": machines.MOUNT_MAC,
}


@dataclass
class World:
    """A machine with a store on it that was closed in order; a fault changes one thing."""

    home: Path
    platform: str
    recorded: dict[str, str]
    flags: dict[str, object] = field(default_factory=dict)

    @property
    def state(self) -> StateDir:
        return StateDir.unlocked(self.home / "state")

    def case(self) -> Case:
        flags = {"state_dir": self.home / "state", "port": 0, "min_free_bytes": 0, **self.flags}
        settings = config.load(flags, {}, None)
        return Case(settings, Machine(self.platform, self.recorded), self.home)

    def findings(self) -> dict[str, Finding]:
        return examine(self.case())


@pytest.fixture(params=["linux", "darwin"])
def world(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    (tmp_path / "openblas").touch()
    monkeypatch.setattr(blas, "PLACES", (tmp_path / "openblas",))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    state_dir = StateDir.open(tmp_path / "state")
    BlockStore.open(state_dir, Metrics()).close(5)
    Starts(state_dir.run).end(0)
    state_dir.close()
    recorded = dict(MAC if request.param == "darwin" else LINUX)
    return World(tmp_path, request.param, recorded)


Fault = Callable[[World], Iterator[None]]


def python(world: World) -> Iterator[None]:
    world.recorded["version python"] = "3.10.4"
    yield


def mlx(world: World) -> Iterator[None]:
    world.recorded["version mlx-lm"] = "0.31.9"
    yield


def openblas(world: World) -> Iterator[None]:
    (world.home / "openblas").unlink()
    yield


def memory(world: World) -> Iterator[None]:
    little = machines.MEMINFO.replace("22643168", "  643168")
    world.recorded["/proc/meminfo"] = little
    free = ("410237", "468023", "  2417", "  7016")
    text = machines.VM_STAT_16K
    for number in free:
        text = text.replace(number, "1".rjust(len(number)))
    world.recorded["vm_stat"] = text
    yield


def wired(world: World) -> Iterator[None]:
    world.recorded["vm_stat"] = machines.VM_STAT_STRANDED
    yield


def open_files(world: World) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def disk(world: World) -> Iterator[None]:
    world.flags["min_free_bytes"] = 1024 << 40
    yield


def file_system(world: World) -> Iterator[None]:
    share = f"nas:/share {world.home} nfs rw 0 0\n"
    world.recorded["/proc/mounts"] = machines.MOUNTS_LINUX + share
    world.recorded["mount"] = machines.MOUNT_MAC + f"//nas/share on {world.home} (smbfs, nodev)\n"
    yield


def state_directory(world: World) -> Iterator[None]:
    world.state.path.chmod(0o750)
    yield


def encryption(world: World) -> Iterator[None]:
    world.recorded["fdesetup status"] = "FileVault is Off.\n"
    yield


def lock(world: World) -> Iterator[None]:
    held = StateDir.open(world.state.path)
    yield
    held.close()


LISTEN = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
"""


def port(world: World) -> Iterator[None]:
    """Another process listens there, really."""
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        number = int(child.stdout.readline())
        world.flags["port"] = number
        asked = f"lsof -nP -iTCP:{number} -sTCP:LISTEN -Fpc"
        world.recorded[asked] = f"p{child.pid}\ncPython\n"
        yield
        found = CHECKS["port"](world.case()).found
        assert f"process {child.pid} (" in found and "ython" in found
        child.kill()


def index(world: World) -> Iterator[None]:
    world.state.index.write_bytes(b"no database" * 1000)
    yield


def quarantine(world: World) -> Iterator[None]:
    (world.state.quarantine / "ab.safetensors.1").write_bytes(b"damaged")
    yield


def unfinished(world: World) -> Iterator[None]:
    (world.state.tmp / "half").write_bytes(b"half")
    yield


def last_ends(world: World) -> Iterator[None]:
    for _ in range(3):
        Starts(world.state.run).note("loading")
    yield


def service(world: World) -> Iterator[None]:
    kind = (Launchd if world.platform == "darwin" else Systemd)(world.home)
    kind.path.parent.mkdir(parents=True)
    text = kind.text(["agent-memory"], 25)
    kind.path.write_text(text)
    assert CHECKS["service"](world.case()).level is Level.OK
    kind.path.write_text(text.replace("60", "5"))
    yield


def model(world: World) -> Iterator[None]:
    (world.home / "model").mkdir()
    (world.home / "model" / "config.json").write_text("{}")
    world.flags["model"] = parse(str(world.home / "model"))
    yield


def context(world: World) -> Iterator[None]:
    world.flags |= {"memory_bytes": 64 << 20, "pool_bytes": 60 << 20}
    yield


FAULTS: list[tuple[Fault, Level]] = [
    (python, Level.FAIL),
    (mlx, Level.FAIL),
    (openblas, Level.WARN),
    (memory, Level.WARN),
    (wired, Level.FAIL),
    (open_files, Level.WARN),
    (disk, Level.WARN),
    (file_system, Level.FAIL),
    (state_directory, Level.WARN),
    (encryption, Level.WARN),
    (lock, Level.WARN),
    (port, Level.FAIL),
    (index, Level.FAIL),
    (quarantine, Level.WARN),
    (unfinished, Level.WARN),
    (last_ends, Level.FAIL),
    (service, Level.FAIL),
    (model, Level.FAIL),
    (context, Level.WARN),
]
ONLY_ON = {"openblas": "linux", "wired": "darwin", "encryption": "darwin"}


@pytest.mark.parametrize(("fault", "level"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
@pytest.mark.requirement("L-26", "S-26")
def test_of_one_fault_exactly_that_is_found(fault: Fault, level: Level, world: World) -> None:
    name = fault.__name__.replace("_", " ")
    if ONLY_ON.get(fault.__name__, world.platform) != world.platform:
        pytest.skip("not a fault of that system")
    before = world.findings()
    assert {found.level for found in before.values()} == {Level.OK}, before
    at_fault: Callable[[World], AbstractContextManager[None]] = contextmanager(fault)
    with at_fault(world):
        after = world.findings()
    changed = {check for check in CHECKS if after[check].level != before[check].level}
    assert changed == {name} and after[name].level is level
    assert after[name].then


@pytest.mark.requirement("L-25")
def test_a_start_tells_of_memory_that_somebody_left_wired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(tmp_path, "darwin", dict(MAC))
    tell_wired(world.case())
    assert capsys.readouterr().err == ""
    world.recorded["vm_stat"] = machines.VM_STAT_STRANDED
    tell_wired(world.case())
    assert "75% of the memory, and no server runs; reboot" in capsys.readouterr().err


@pytest.mark.requirement("S-26")
def test_whether_backups_copy_what_is_remembered(tmp_path: Path) -> None:
    world = World(tmp_path, "darwin", dict(MAC))
    path = world.home / "state"
    assert f"unless: tmutil addexclusion {path}" in world.findings()["encryption"].found
    world.recorded[f"tmutil isexcluded {path}"] = f"[Excluded]    {path}\n"
    assert "Time Machine leaves out" in world.findings()["encryption"].found


def test_the_command_says_it_in_words_and_as_json(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        flags = ["--state-dir", str(tmp_path / "state")]
        (tmp_path / "c.toml").write_text(f"port = {number}\n")
        flags += ["--config", str(tmp_path / "c.toml")]
        done = run("doctor", "--json", *flags)
        findings = {found["check"]: found for found in json.loads(done.stdout)}
        assert done.returncode == 1 and list(findings) == list(CHECKS)
        assert findings["port"]["level"] == "fail"
        assert f"process {os.getpid()} (" in findings["port"]["found"]
        words = run("doctor", *flags)
        assert words.returncode == 1 and "→ stop it, or choose another --port" in words.stdout
        (tmp_path / "c.toml").write_text("port = 0\n")
        assert run("doctor", *flags).returncode == 0


def test_reset_forgives(tmp_path: Path) -> None:
    state_dir = StateDir.open(tmp_path / "state")
    for _ in range(3):
        Starts(state_dir.run).note("loading")
    held = Starts(state_dir.run)
    state_dir.close()
    assert held.held_for_s() > 0
    done = run("doctor", "--reset", "--state-dir", str(tmp_path / "state"))
    assert "forgiven" in done.stderr and "in order, lately" in done.stdout
    assert held.held_for_s() == 0


def run(*args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "agent_memory", *args],
        env={**os.environ, "AGENT_MEMORY_MIN_FREE_BYTES": "0"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_model_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    world = World(tmp_path, "linux", dict(LINUX), {"model": parse(str(builtin.PATH)), "kv_bits": 8})
    found = world.findings()["context"].found
    assert found.startswith("8,192 tokens, 1.1 kB of memory for each")
    assert world.findings()["model"].found.endswith("of weights")
    world.flags["memory_bytes"] = 1 << 20
    assert "do not fit" in world.findings()["model"].found
    world.flags["model"] = parse("no-such/model")
    assert world.findings()["model"].level is Level.WARN


@pytest.mark.requirement("L-26")
def test_what_cannot_be_looked_at_is_one_finding(tmp_path: Path) -> None:
    flags = {"state_dir": tmp_path / "state", "uds": None, "port": 1, "host": "no.such.invalid"}
    settings = config.load({**flags, "api_keys": keys.parse("k" * 16)}, {}, None)
    found = examine(Case(settings, Machine("linux", LINUX), tmp_path))
    assert found["port"].level is Level.FAIL and found["port"].then
    assert set(found) == set(CHECKS)
