"""What recorded machines said, understood; and what no machine would say, borne."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from agent_memory.ops import readings
from agent_memory.ops.readings import Listener, Memory
from tests.ops import machines
from tests.suites import NewSuite

SEED = 20261121
TOTAL = 24 << 30


def test_pages_of_sixteen_and_of_four_kilobytes() -> None:
    big = readings.vm_stat(machines.VM_STAT_16K, TOTAL)
    assert big is not None and big.wired == 143360 * 16384
    assert big.available == (410237 + 468023 + 2417 + 7016) * 16384
    small = readings.vm_stat(machines.VM_STAT_4K, TOTAL)
    assert small is not None and small.wired == 2 << 30
    assert small.total == TOTAL


@pytest.mark.parametrize(
    "text",
    [
        "",
        "vm_stat: command not found",
        machines.VM_STAT_16K.replace("16384", "0"),
        machines.VM_STAT_16K.replace("wired down", "verdrahtet"),
        machines.VM_STAT_16K.replace("143360", "143360000000"),  # more than there is
        machines.VM_STAT_16K.replace("(page size of 16384 bytes)", ""),
    ],
)
def test_no_number_is_better_than_a_wrong_one(text: str) -> None:
    assert readings.vm_stat(text, TOTAL) is None
    assert readings.vm_stat(machines.VM_STAT_16K, 0) is None


def test_meminfo() -> None:
    assert readings.meminfo(machines.MEMINFO) == Memory(24684088 << 10, 22643168 << 10)
    assert readings.meminfo("MemTotal: 1 kB\n") is None


def test_sysctl() -> None:
    text = "hw.memsize: 25769803776\nkern.boottime = { sec = 1 }\nnonsense\n"
    assert readings.sysctl(text) == {"hw.memsize": "25769803776", "kern.boottime": "{ sec = 1 }"}
    assert [readings.whole(text) for text in ("7", "-7", "", "٣", "9" * 30)] == [7, 0, 0, 0, 0]


def test_the_innermost_mount_counts() -> None:
    mac = readings.macos_mounts(machines.MOUNT_MAC)
    linux = readings.linux_mounts(machines.MOUNTS_LINUX)
    for mounts, path, kind in [
        (mac, "/Users/ann", "apfs"),
        (mac, "/Volumes/share/state", "smbfs"),
        (mac, "/Volumes/shared", "apfs"),
        (linux, "/home/ann", "ext4"),
        (linux, "/mnt/my files/state", "nfs4"),
        ([], "/", ""),
        ([(Path("/a"), "ext4"), (Path("/a"), "nfs")], "/a/b", "nfs"),
    ]:
        assert readings.kind_at(Path(path), mounts) == kind


def test_who_listens() -> None:
    assert readings.listening_inodes(machines.PROC_NET_TCP, 8000) == {"38123"}
    assert readings.listening_inodes(machines.PROC_NET_TCP, 8001) == set()
    assert readings.lsof(machines.LSOF) == Listener(4711, "python3.11")
    assert readings.lsof("") is None


PARSERS: list[tuple[Callable[[str], object], str]] = [
    (lambda text: readings.vm_stat(text, TOTAL), machines.VM_STAT_16K),
    (lambda text: readings.vm_stat(text, TOTAL), machines.VM_STAT_4K),
    (readings.sysctl, "".join(machines.SYSCTL.values())),
    (readings.meminfo, machines.MEMINFO),
    (readings.macos_mounts, machines.MOUNT_MAC),
    (readings.linux_mounts, machines.MOUNTS_LINUX),
    (readings.lsof, machines.LSOF),
    (lambda text: readings.listening_inodes(text, 8000), machines.PROC_NET_TCP),
]


def mutated(rng: Random, text: str) -> str:
    """With a few characters changed, cut, doubled, or put in from anywhere."""
    for _ in range(rng.randint(1, 6)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        odd = rng.choice(["", "\0", "\n", "9" * 40, "-", ":", " ", "é", text[at:to], "\\777", "."])
        text = rng.choice([text[:at] + odd + text[to:], text[:at] + odd + text[at:], text[:to]])
    return text[:20_000]


def test_no_text_is_too_odd(suite: NewSuite) -> None:
    """None raises, and what memory is read is possible."""
    rng = Random(SEED)
    with suite("machine texts", 2000, SEED) as cases:
        for n in range(2000):
            parse, text = PARSERS[n % len(PARSERS)]
            with cases.case(n):
                understood = parse(mutated(rng, text))
                if isinstance(understood, Memory) and understood.wired is not None:
                    assert 0 <= understood.wired <= TOTAL
                    assert 0 <= understood.available <= TOTAL
