"""One server per directory, and nobody else's eyes in it."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_memory.errors import StateDirError, StateDirLocked
from agent_memory.store.state_dir import StateDir, private_folder

HOLD = """
import sys, time
from pathlib import Path
from agent_memory.store.state_dir import StateDir
state = StateDir.open(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.requirement("S-04")
def test_made_private_and_locked(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "a" / "b")
    assert mode(state.path) == mode(state.run) == 0o700
    assert (state.path / "LOCK").read_text().startswith(f"{os.getpid()} 20")
    state.close()
    state.close()


@pytest.mark.requirement("S-04")
def test_permissions_are_taken_back(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o757)
    StateDir.open(tmp_path / "open").close()
    assert mode(tmp_path / "open") == 0o700


def test_the_second_is_told_the_first_ones_pid(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path)
    before = (tmp_path / "LOCK").read_bytes()
    with pytest.raises(StateDirLocked, match=rf"process {os.getpid()}, started 20.*kill -TERM"):
        StateDir.open(tmp_path)
    assert (tmp_path / "LOCK").read_bytes() == before
    first.close()
    StateDir.open(tmp_path).close()


@pytest.mark.requirement("F-18")
def test_a_killed_holder_holds_no_longer(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        with pytest.raises(StateDirLocked, match=f"process {child.pid}"):
            StateDir.open(tmp_path)
        child.send_signal(signal.SIGKILL)
    StateDir.open(tmp_path).close()


def test_a_second_process_leaves_within_a_second(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    second = subprocess.run(
        [sys.executable, "-c", HOLD, tmp_path], capture_output=True, text=True, timeout=10
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert "StateDirLocked" in second.stderr
    state.close()


def test_only_light_modules_are_imported() -> None:
    code = "import agent_memory.store.state_dir, sys; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"numpy", "mlx", "sqlite3", "structlog", "asyncio", "xxhash"} & set(modules)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    file, link, folder = tmp_path / "file", tmp_path / "link", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    link.symlink_to(folder)
    (folder / "LOCK").symlink_to(file)
    for path, said in [
        (file, "file is not a directory. Move it away"),
        (file / "below", "file.* is not a directory. Move it away"),
        (link, "is a symbolic link. Give"),
        (folder, "LOCK cannot be written: .* Make its folder writable"),
    ]:
        with pytest.raises(StateDirError, match=said):
            StateDir.open(path)
    assert file.read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_one_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(StateDirError, match="choose another"):
        StateDir.open(tmp_path / "shut" / "state")


@pytest.mark.requirement("S-20")
def test_a_planted_link_is_no_folder_of_ours(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("/")
    with pytest.raises(StateDirError, match="run is a symbolic link"):
        StateDir.open(tmp_path)
    (tmp_path / "run").unlink()
    StateDir.open(tmp_path).close()  # the refusal did not keep the lock


def test_names(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path)
    name = "ab" + 31 * "01"
    assert state.block_path(bytes.fromhex(name)) == tmp_path / f"blocks/ab/{name}.safetensors"
    assert state.block_path(bytes.fromhex(name)).parent in state.block_folders()
    assert state.next_set_aside() == tmp_path / "set-aside-1"
    private_folder(tmp_path / "set-aside-1")
    private_folder(tmp_path / "set-aside-3")
    assert state.next_set_aside() == tmp_path / "set-aside-2"
    state.close()
