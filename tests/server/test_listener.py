"""A Unix socket: whose it is, what is left of a dead server's, and HTTP through it."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agent_memory.errors import ConfigError, PortInUse
from agent_memory.server.listener import Listener
from tests.process import CHAT, Server, chat

OTHER_USER = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """Everybody may look in here; and a path of a socket must be short."""
    made = Path(tempfile.mkdtemp(dir="/tmp")).resolve()
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def mode(path: Path) -> int:
    return path.lstat().st_mode & 0o777


@pytest.mark.requirement("S-03")
def test_only_its_owner_can_open_it(folder: Path) -> None:
    path = folder / "socket"
    with Listener.unix(path) as listener:
        assert mode(path) == mode(folder / "socket.lock") == 0o600
        assert listener.url == f"unix:{path}"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def connects_as_other(path: Path) -> str:
    """What another user hears."""
    call = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    command = [shutil.which("python3", path="/usr/bin:/bin") or "", "-c", call, str(path)]
    done = subprocess.run(command, user=OTHER_USER, capture_output=True, text=True, timeout=20)
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.requirement("S-03")
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("python3", path="/usr/bin:/bin"),
    reason="only root can be another user, who must find a Python",
)
def test_another_user_does_not_get_in(folder: Path) -> None:
    path = folder / "socket"
    with Listener.unix(path):
        assert connects_as_other(path).startswith("PermissionError")
        path.chmod(0o666)
        assert connects_as_other(path) == ""


def test_one_in_use_is_left_alone(folder: Path) -> None:
    path = folder / "socket"
    with Listener.unix(path):
        before = path.stat().st_ino
        with pytest.raises(PortInUse, match="--uds"):
            Listener.unix(path)
        assert path.stat().st_ino == before


def test_one_of_a_program_that_knows_no_lock_is_left_alone(folder: Path) -> None:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(PortInUse):
            Listener.unix(path)
        assert path.exists()


def test_a_dead_servers_is_taken_over(folder: Path) -> None:
    path = folder / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with Listener.unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_what_is_no_socket_is_left_alone(folder: Path) -> None:
    path = folder / "socket"
    path.write_text("letter")
    with pytest.raises(ConfigError, match="is no socket"):
        Listener.unix(path)
    assert path.read_text() == "letter"
    path.unlink()
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(ConfigError, match="is no socket"):
        Listener.unix(path)


@pytest.mark.parametrize("place", ["absent/socket", "x" * 200])
def test_a_path_that_cannot_be(folder: Path, place: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on: .*Choose another path"):
        Listener.unix(folder / place)


@pytest.mark.requirement("S-03")
def test_a_folder_that_others_may_write_to_is_refused(folder: Path) -> None:
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may change"):
        Listener.unix(folder / "socket")
    folder.chmod(0o1777)  # as /tmp
    Listener.unix(folder / "socket").close()


def test_where_a_wildcard_is_found() -> None:
    with Listener.tcp("0.0.0.0", 0) as listener:
        assert listener.url == f"http://127.0.0.1:{listener.where['port']}"
        assert listener.where["host"] == "0.0.0.0"


@pytest.mark.requirement("S-03")
def test_a_server_on_a_unix_socket(tmp_path: Path, folder: Path) -> None:
    path = folder / "socket"
    with (
        Server(tmp_path, "--uds", str(path)) as server,
        httpx.Client(
            base_url="http://localhost", transport=httpx.HTTPTransport(uds=str(path)), timeout=60
        ) as client,
    ):
        assert server.event("server_listening")["uds"] == str(path)
        assert client.get("/healthz").json()["status"] == "ok"
        server.wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post(CHAT, json=chat("Hello")).status_code == 200
        assert client.get("/healthz", headers={"Host": "example.com"}).status_code == 421
        second = [sys.executable, "-m", "agent_memory", "serve", "--uds", str(path)]
        flags = ["--no-preload", "--state-dir", str(tmp_path / "other")]
        done = subprocess.run([*second, *flags], capture_output=True, text=True, timeout=30)
        assert done.returncode == 69 and "Traceback" not in done.stderr
        command = [sys.executable, "-m", "agent_memory"]
        told = [*command, "status", "--state-dir", str(server.state_dir)]
        shown = subprocess.run(told, capture_output=True, text=True, timeout=30)
        assert (
            shown.returncode == 0 and f"unix:{path}" in shown.stdout and "builtin" in shown.stdout
        )
        client.close()
        assert server.stop().exit_code == 0
    assert not path.exists()
