"""F17, F19, F20: two servers, clocks that jump, state directories that cannot be used."""

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from agent_memory.block import Block, chain
from agent_memory.errors import StateDirError
from tests.faults.killed import NOBODY, SPEC, child, open_as_nobody, payload_of
from tests.process import Server
from tests.store.conftest import Opener
from tests.suites import NewSuite, sized

SEED = 200
CPU_S = 1.0
"""What a second server may cost until it leaves.  Its time on the clock depends on the others."""


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """But for the file in which a server says every minute that it is still there."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "starts.jsonl"
    }


def cpu_s_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.requirement("F-17")
@sized(short=2, full=50)
def test_a_second_server_leaves_at_once(num_cases: int, tmp_path: Path, suite: NewSuite) -> None:
    command = [sys.executable, "-m", "agent_memory", "serve", "--port", "0"]
    with Server(tmp_path) as first:
        first.wait_ready()
        before = listing(first.state_dir)
        command += ["--state-dir", str(first.state_dir)]
        with suite("F17 two servers", num_cases, None) as cases:
            for n in range(num_cases):
                with cases.case(n):
                    used = cpu_s_of_children()
                    second = subprocess.run(command, capture_output=True, text=True, timeout=20)
                    assert cpu_s_of_children() - used < CPU_S
                    assert second.returncode == 75, second.stderr
                    assert f"process {first.pid}" in second.stderr
                    assert listing(first.state_dir) == before
        assert first.get("/readyz").status_code == 200


JUMPS_S = [3600.0, -3600.0, 86_400.0, -86_400.0, 365 * 86_400.0]


@pytest.mark.requirement("F-19")
@sized(short=10, full=50)
def test_the_clock_jumps(
    num_cases: int, fast_folder: Path, suite: NewSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns of five agents, the clock set before each: nothing goes, and who was last was last."""
    rng, opener = Random(SEED), Opener(fast_folder / "state", SPEC, payload_of)
    now, order = time.time(), list[str]()
    chains: dict[str, list[Block]] = {}
    opener.open()
    with suite("F19 the clock jumps", num_cases, SEED) as cases:
        for n in range(num_cases):
            now = rng.choice([0.0, 1.0, time.monotonic(), 4e9, *(now + by for by in JUMPS_S)])
            monkeypatch.setattr(time, "time", lambda now=now: now)
            with cases.case((n, now)):
                name = f"agent-{rng.randrange(5)}"
                chains[name] = chain(SPEC.fingerprint, [ord(name[-1]), *range(20 * n + 20)])
                assert all(opener.put(*chains[name]))
                opener.store.record(name, SPEC.fingerprint, chains[name])
                order = [name, *(other for other in order if other != name)]
                if n % 3 == 0:
                    opener.open()
                agents = opener.store.agents.all()
                assert [agent.id for agent in agents] == order
                for agent in agents:
                    assert agent.heads[0].chain == tuple(chains[agent.id])
                    assert all(map(opener.read, agent.heads[0].chain))
                opener.store.check()
    opener.close()


class Place:
    """A state directory that nobody owns, with a chain in it, where nobody may go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.blocks = chain(SPEC.fingerprint, range(600))
        self.opener = Opener(self.state, SPEC, payload_of)

    def make(self) -> None:
        self.opener.open()
        assert all(self.opener.put(*self.blocks))
        self.opener.store.record("ada", SPEC.fingerprint, self.blocks)
        self.opener.close()
        if os.geteuid() == 0:
            for path in [self.folder, self.state, *self.state.rglob("*")]:
                os.chown(path, NOBODY, NOBODY)

    def mend(self) -> None:
        for path in [self.folder, self.state, *self.state.glob("**/*")]:
            path.chmod(0o700 if path.is_dir() else 0o600)

    def opened(self) -> str:
        with child(open_as_nobody, self.state, self.blocks) as (_, tell):
            return bytes(tell.recv_bytes()).decode()


@pytest.fixture
def place(fast_folder: Path) -> Iterator[Place]:
    folder = fast_folder / "home"
    folder.mkdir()
    fast_folder.chmod(0o755)
    yield Place(folder)


def shut(place: Place) -> Path:
    return place.state


def shut_home(place: Place) -> Path:
    return place.folder


def shut_lock(place: Place) -> Path:
    return place.state / "LOCK"


def shut_index(place: Place) -> Path:
    return place.state / "index.db"


def shut_version(place: Place) -> Path:
    return place.state / "VERSION"


def shut_blocks(place: Place) -> Path:
    return place.state / "blocks"


@pytest.mark.requirement("F-20")
@sized(short=1, full=20)
@pytest.mark.parametrize(
    "what", [shut, shut_home, shut_lock, shut_index, shut_version, shut_blocks]
)
def test_what_may_not_be_read(
    what: Callable[[Place], Path], num_cases: int, place: Place, suite: NewSuite
) -> None:
    """Said with what to do about it; and afterwards everything is there."""
    name = f"F20 state directory: {what.__name__.replace('_', ' ')}"
    with suite(name, num_cases, None) as cases:
        for n in range(num_cases):
            with cases.case(n):
                place.make()
                what(place).chmod(0)
                said = place.opened()
                place.mend()
                assert str(place.state) in said and "choose another" in said, said
                assert place.opened() == f"opened {len(place.blocks)}"
                shutil.rmtree(place.state)


@pytest.mark.requirement("F-20")
@sized(short=1, full=20)
def test_a_read_only_file_system(num_cases: int, place: Place, suite: NewSuite) -> None:
    def mount(*flags: str) -> int:
        return subprocess.call(["mount", *flags], stderr=subprocess.DEVNULL)

    place.make()
    bound = ["--bind", str(place.folder), str(place.folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or mount(*bound):
        pytest.skip("nothing can be mounted here")
    try:
        with suite("F20 state directory: read-only", num_cases, None) as cases:
            for n in range(num_cases):
                with cases.case(n):
                    assert mount("-o", "remount,bind,ro", str(place.folder)) == 0
                    said = place.opened()
                    assert mount("-o", "remount,bind,rw", str(place.folder)) == 0
                    assert "Read-only file system" in said and "choose another" in said, said
                    assert place.opened() == f"opened {len(place.blocks)}"
    finally:
        subprocess.check_call(["umount", str(place.folder)])


def vanished(opener: Opener) -> None:
    shutil.rmtree(opener.path)


def moved(opener: Opener) -> None:
    opener.path.rename(opener.path.with_name("elsewhere"))


def emptied(opener: Opener) -> None:
    for path in opener.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def a_link(opener: Opener) -> None:
    elsewhere = opener.path.with_name("elsewhere")
    opener.path.rename(elsewhere)
    opener.path.symlink_to(elsewhere)


@pytest.mark.requirement("F-20")
@sized(short=1, full=20)
@pytest.mark.parametrize("change", [vanished, moved, emptied, a_link])
def test_gone_while_in_use(
    change: Callable[[Opener], None], num_cases: int, fast_folder: Path, suite: NewSuite
) -> None:
    """Every question is still answered; a link is then refused, an empty place is begun anew."""
    name = f"F20 state directory: {change.__name__.replace('_', ' ')}"
    blocks, more = (chain(SPEC.fingerprint, range(n, n + 600)) for n in (0, 7000))
    with suite(name, num_cases, None) as cases, capture_logs():
        for n in range(num_cases):
            opener = Opener(fast_folder / f"{n}" / "state", SPEC, payload_of)
            with cases.case(n):
                store = opener.open()
                assert all(opener.put(*blocks))
                change(opener)
                written = opener.put(*more)
                assert written == ([True] * 3 if change is a_link else [False] * 3)
                store.record("ada", SPEC.fingerprint, more)
                for block in [*blocks, *more]:
                    opener.read(block)
                store.check()
                opener.close()
                if change is a_link:
                    with pytest.raises(StateDirError, match="is a symbolic link"):
                        opener.open()
                else:
                    opener.open()
                    assert all(opener.put(*blocks)) and all(map(opener.read, blocks))
                    opener.close()
            shutil.rmtree(fast_folder / f"{n}")
