"""What the doctor looks at: a table of small functions, each of one matter.

Each says what it found, how bad that is, and what to do next.  None changes anything, and none
needs the server.  Main thread.
"""

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from agent_memory.config import Config
from agent_memory.errors import ConfigError, StateDirError
from agent_memory.ops import backend, blas, model_facts
from agent_memory.ops.machine import Machine
from agent_memory.ops.model_facts import ModelFacts
from agent_memory.ops.running import Running, read_starts
from agent_memory.ops.service import Launchd, Systemd
from agent_memory.ops.terminal import number, size
from agent_memory.stages import PROMISE_S
from agent_memory.store import look, starts
from agent_memory.store.limits import AUTO_MIN_FREE_BYTES
from agent_memory.store.state_dir import StateDir

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
MLX = (0, 32, 4)
MLX_LM = (0, 32, 2)
WIRED_WARN, WIRED_FAIL = 0.5, 0.7
"""Of the machine's memory: beyond what is left of it no model fits."""
LITTLE_BYTES = 2 << 30
WEIGHTS_WITH_WORK = 1.15
OPEN_FILES = 1024
FAR_AWAY = {"nfs", "nfs4", "smbfs", "cifs", "smb3", "afpfs", "webdav", "9p", "fuse.sshfs"}
SYNCED = ("Library/Mobile Documents", "Library/CloudStorage")


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`then`: what to do next; nothing where nothing need be done."""

    level: Level
    found: str
    then: str = ""


def ok(found: str) -> Finding:
    return Finding(Level.OK, found)


def warn(found: str, then: str) -> Finding:
    return Finding(Level.WARN, found, then)


def fail(found: str, then: str) -> Finding:
    return Finding(Level.FAIL, found, then)


class Case:
    """What is looked at, each thing once."""

    def __init__(self, settings: Config, machine: Machine, home: Path) -> None:
        self.settings = settings
        self.machine = machine
        self.home = home
        self.path = settings.state_dir

    @cached_property
    def running(self) -> Running | None:
        return Running.find(self.path)

    @cached_property
    def model(self) -> ModelFacts | None:
        """Raises OSError, ValueError."""
        path = model_facts.find(self.settings.models[0].source)
        return model_facts.read(path, self.settings) if path else None

    @property
    def limit_bytes(self) -> int | None:
        return self.settings.memory_bytes or self.machine.gpu_bytes


def python(case: Case) -> Finding:
    version = case.machine.python
    text = ".".join(map(str, version))
    if version < OLDEST_PYTHON:
        return fail(f"Python {text}", "install Python 3.11 or newer, and this into it")
    if version[:2] > NEWEST_PYTHON:
        return warn(f"Python {text}, newer than what this is tested with", "take Python 3.13")
    return ok(f"Python {text}")


def mlx(case: Case) -> Finding:
    """Without loading it: a broken one would take us with it."""
    install = "pip install --upgrade agent-memory, with [cpu] or [cuda] on Linux"
    for package, wanted in (("mlx", MLX), ("mlx-lm", MLX_LM)):
        version = case.machine.version(package)
        text = ".".join(map(str, version))
        if not version:
            return fail(f"{package} is not installed", install)
        if version < wanted or version[:2] != wanted[:2]:
            return fail(f"{package} {text}, not {'.'.join(map(str, wanted))}", install)
    return ok("mlx and mlx-lm are those this was made for")


def backend_(case: Case) -> Finding:
    chip = case.machine.chip or "an unknown chip"
    try:
        return ok(f"{'metal' if case.machine.is_mac else backend.find()} on {chip}")
    except ConfigError as error:
        return fail(str(error), "see above")


def openblas(case: Case) -> Finding:
    if case.machine.is_mac or blas.find() is not None:
        return ok("nothing to add")
    return warn(
        "OpenBLAS is not there: models on the CPU are several times slower",
        "apt install libopenblas0-pthread",
    )


def memory(case: Case) -> Finding:
    seen = case.machine.memory
    if seen is None:
        return warn("how much memory there is cannot be read", "")
    text = f"{size(seen.available)} of {size(seen.total)} available"
    if case.running is None and seen.available < min(LITTLE_BYTES, seen.total // 4):
        return warn(text, "close what takes much of it")
    return ok(text)


def wired(case: Case) -> Finding:
    seen = case.machine.memory
    if seen is None or seen.wired is None:
        return ok("no such thing here")
    share = seen.wired / seen.total
    text = f"{size(seen.wired)} are wired, {share:.0%} of the memory"
    if case.running is not None:
        return ok(f"{text}, with a model in it")
    if share > WIRED_FAIL:
        return fail(f"{text}, and no server runs", "reboot: nothing else gives it back")
    if share > WIRED_WARN:
        return warn(f"{text}, and no server runs", "look for another that runs a model, or reboot")
    return ok(text)


def open_files(case: Case) -> Finding:
    soft = case.machine.open_files
    if soft < OPEN_FILES:
        return warn(f"only {soft} open files are allowed", "ulimit -n 8192, before the start")
    return ok(f"{number(soft)} open files are allowed")


def disk(case: Case) -> Finding:
    usage = shutil.disk_usage(_existing(case.path))
    asked = case.settings.min_free_bytes
    floor = min(usage.total // 20, AUTO_MIN_FREE_BYTES) if asked is None else asked
    text = f"{size(usage.free)} of {size(usage.total)} are free"
    if usage.free < floor:
        return warn(
            f"{text}, fewer than the {size(floor)} that shall stay so: nothing new is kept",
            "make room, or set --min-free-bytes lower",
        )
    return ok(text)


def file_system(case: Case) -> Finding:
    kind = case.machine.kind_of_disk(_existing(case.path))
    if kind in FAR_AWAY:
        return fail(f"{case.path} is on {kind}: locks there hold nobody off", "take a local disk")
    if any(folder in str(case.path) for folder in SYNCED):
        return fail(f"{case.path} is copied to a cloud while it changes", "take another folder")
    return ok(kind or "not known")


def state_dir(case: Case) -> Finding:
    path, other = case.path, "set --state-dir to a folder of your own"
    if path.is_symlink():
        return fail(f"{path} is a symbolic link", f"name what it points to: {path.resolve()}")
    if not path.exists():
        return ok(f"{path} is made at the first start")
    facts = path.stat()
    if not stat.S_ISDIR(facts.st_mode):
        return fail(f"{path} is no folder", "move it away")
    if facts.st_uid != os.geteuid():
        return fail(f"{path} belongs to user {facts.st_uid}", other)
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return fail(f"{path} cannot be written", f"chmod 700 {path}")
    if mode := facts.st_mode & 0o077:
        return warn(f"others may look into {path} (mode …{mode:02o})", f"chmod 700 {path}")
    return ok(f"{path} is yours alone")


def lock(case: Case) -> Finding:
    if (running := case.running) is not None:
        holder = running.holder
        if holder.url:
            return ok(f"server {holder.pid} at {holder.url}")
        return warn(f"process {holder.pid} is at work there, and is no server", "wait for its end")
    last = StateDir.holder(case.path)
    killed = f"; the last, process {last.pid}, was killed" if last else ""
    return ok(f"nobody holds it{killed}")


def port(case: Case) -> Finding:
    if case.settings.uds:
        return ok("none, but a Unix socket")
    host, wanted, machine = case.settings.host, case.settings.port, case.machine
    if wanted == 0 or not machine.listens(host, wanted):
        return ok(f"{wanted} is free" if wanted else "any that is free")
    if case.running is not None and case.running.holder.url.endswith(f":{wanted}"):
        return ok(f"{wanted} is this server's")
    other = machine.listener(wanted)
    who = f"process {other.pid} ({other.command})" if other else "another user's process"
    return fail(f"{who} listens on {wanted}", "stop it, or choose another --port")


def encryption(case: Case) -> Finding:
    """What is remembered is as readable as the prompts it was made of."""
    if not case.machine.is_mac:
        return ok("whether the disk is encrypted is not looked at on this system")
    said = case.machine.output("fdesetup", "status")
    backups = case.machine.output("tmutil", "isexcluded", str(case.path))
    if "[Excluded]" in backups:
        copied = "Time Machine leaves out what is remembered"
    else:
        copied = f"Time Machine copies what is remembered, unless: tmutil addexclusion {case.path}"
    if "FileVault is On" in said:
        return ok(f"FileVault is on; {copied}")
    return warn(
        f"FileVault is not on: who has the disk can read what is remembered; {copied}",
        "turn it on in System Settings, Privacy & Security",
    )


def index(case: Case) -> Finding:
    state = StateDir.unlocked(case.path)
    if not state.version.exists():
        return ok("nothing is remembered yet")
    try:
        seen = look.look(state)
    except StateDirError as error:
        return fail(str(error), "agent-memory stop, then agent-memory store rebuild")
    agents, blocks = number(len(seen.agents)), number(seen.blocks.count)
    return ok(f"{agents} agents, {blocks} blocks, {size(seen.blocks.nbytes)}")


def quarantine(case: Case) -> Finding:
    bad = look.contents(StateDir.unlocked(case.path).quarantine)
    if bad.count:
        return warn(
            f"{number(bad.count)} files were not what was written ({size(bad.nbytes)})",
            "look whether the disk is well, then agent-memory store gc",
        )
    return ok("empty")


def orphans(case: Case) -> Finding:
    left = look.contents(StateDir.unlocked(case.path).tmp)
    if left.count and case.running is None:
        return warn(
            f"{number(left.count)} unfinished files ({size(left.nbytes)}) of one that was killed",
            "nothing: the next start removes them",
        )
    return ok("none")


def ends(case: Case) -> Finding:
    """How the last servers ended."""
    known, now = read_starts(case.path), time.time()
    earlier = [s for s in known if case.running is None or s.pid != case.running.holder.pid]
    reset = starts.read_reset(case.path / "run")
    if starts.held_for_s(earlier, reset, now):
        return fail(
            "three servers ended badly within ten minutes: no model is loaded",
            f"look at {case.path / 'run'} and the log, then agent-memory doctor --reset",
        )
    bad = starts.num_unclean([start for start in earlier if start.last > reset], now)
    if bad:
        return warn(
            f"{bad} of the servers of the last ten minutes ended badly",
            f"look at {case.path / 'run'} and the log",
        )
    return ok("in order, lately")


def service(case: Case) -> Finding:
    kind = (Launchd if case.machine.is_mac else Systemd)(case.home)
    if not kind.path.exists():
        return ok("not installed")
    waits_s = kind.stop_s(kind.path.read_text("utf-8", "replace"))
    needs_s = case.settings.drain_timeout + PROMISE_S
    anew = "agent-memory service install --force"
    if waits_s is None:
        return warn(f"how long {kind.path} waits at the end cannot be read", anew)
    if waits_s < needs_s:
        return fail(f"{kind.name} kills after {waits_s:g} s what may take {needs_s:g} s", anew)
    return ok(f"{kind.name} waits {waits_s:g} s for what takes {needs_s:g} s at most")


def model(case: Case) -> Finding:
    name, limit = case.settings.models[0].source, case.limit_bytes
    try:
        facts = case.model
    except (OSError, ValueError) as error:
        return fail(f"config.json of {name} cannot be read: {error}", "download the model anew")
    if facts is None and not Path(name).is_absolute():
        return warn(f"{name} is not on this machine yet", "the first start downloads it")
    if facts is None or not facts.weights_bytes:
        return fail(f"there are no weights of {name}", "correct --model")
    text = f"{size(facts.weights_bytes)} of weights"
    if limit and facts.weights_bytes * WEIGHTS_WITH_WORK > limit:
        return fail(f"{text} do not fit into {size(limit)}", "choose a smaller or quantized model")
    return ok(text)


def context(case: Case) -> Finding:
    try:
        facts = case.model
    except (OSError, ValueError):
        facts = None
    limit = case.limit_bytes
    if facts is None or not (facts.context and facts.token_bytes and limit):
        return ok("known when the model is loaded")
    left = limit - round(facts.weights_bytes * WEIGHTS_WITH_WORK) - case.settings.pool_bytes
    fit = max(0, left) // facts.token_bytes
    text = f"{number(facts.context)} tokens, {size(facts.token_bytes)} of memory for each"
    if fit < facts.context:
        return warn(
            f"{text}: there is room for some {number(fit)} of them",
            "fewer --kv-bits, a smaller --pool-bytes, or a smaller model",
        )
    return ok(text)


CHECKS: dict[str, Callable[[Case], Finding]] = {
    "python": python,
    "mlx": mlx,
    "backend": backend_,
    "openblas": openblas,
    "memory": memory,
    "wired": wired,
    "open files": open_files,
    "disk": disk,
    "file system": file_system,
    "state directory": state_dir,
    "encryption": encryption,
    "lock": lock,
    "port": port,
    "index": index,
    "quarantine": quarantine,
    "unfinished": orphans,
    "last ends": ends,
    "service": service,
    "model": model,
    "context": context,
}


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())
