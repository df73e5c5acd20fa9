"""The process that serves: port first, then everything else, and out again in order.

    bind ─► open the store, begin to load ─► serve … signal ─► stages 1, 2 ─► connections end
         ─► stages 3 to 6 ─► exit

The first SIGTERM or SIGINT begins the end, every further one leaves running requests no more time.
Main thread, event loop.
"""

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Never, cast

import hypercorn.asyncio
import hypercorn.config
import structlog
from hypercorn.typing import Framework

from agent_memory import heap
from agent_memory.config import Config, is_loopback
from agent_memory.errors import StartError
from agent_memory.server import logs
from agent_memory.server.lifespan import Lifespan
from agent_memory.server.listener import BACKLOG, Listener
from agent_memory.server.recorder import Recorder
from agent_memory.server.shutdown import leave_within
from agent_memory.stages import HARD_DEADLINE_S, PROMISE_S
from agent_memory.store.state_dir import StateDir

CONNECTIONS_S = 1.0
ABORTED_S = 0.5
GRACEFUL_S = 3.0  # Hypercorn's own patience: above both, so that ours ends first
KEEP_ALIVE_S = 75  # longer than clients keep a connection they do not use: they close it, not we

log = structlog.get_logger(__name__)


def main(config: Config, state_dir: StateDir) -> Never:
    """Serve until told to stop, and end the process.  Raises StartError.

    The interpreter's own end is left out: native threads are still taking down what they kept for
    themselves, MLX its compiled functions, and who asks for a dying interpreter is aborted.
    """
    heap.share()
    logs.configure(config.log_format)
    with Listener.open(config) as listener:
        state_dir.sign(listener.url, config.drain_timeout + PROMISE_S)
        recorder = Recorder(state_dir.run)
        try:
            status = asyncio.run(_serve(config, state_dir, recorder, listener))
        except StartError as error:
            recorder.end(error.exit_code)
            raise
        recorder.end(status)
    state_dir.close()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


async def _serve(
    config: Config, state_dir: StateDir, recorder: Recorder, listener: Listener
) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _signalled, number, stop, hurry)
    lifespan = await Lifespan.open(config, state_dir, recorder, hurry)
    lifespan.connections.track()
    watching = asyncio.create_task(lifespan.watch(stop))
    log.info("server_listening", **listener.where)
    if config.uds is None and not is_loopback(config.host):
        log.warning("keys_and_prompts_cross_the_network_in_plain_http", host=config.host)
    recorder.ready()
    drained = asyncio.Event()
    serving = asyncio.create_task(
        hypercorn.asyncio.serve(
            cast(Framework, lifespan.gate),  # ASGI, in Hypercorn's words
            _settings(config, listener),
            shutdown_trigger=drained.wait,
        )
    )
    try:
        await _first(serving, stop)
        recorder.stopping()
        leave_within(config.drain_timeout + HARD_DEADLINE_S, lifespan.unfinished, recorder.faults)
        await lifespan.drain()
        drained.set()
        await _end_connections(lifespan, serving)
    finally:
        await lifespan.close()
    if error := await _failure(serving):
        log.error("http_server_failed", exc_info=error)
        lifespan.count_as_failed("http_server")
    watching.cancel()
    _leave_workers()
    return lifespan.report()


def _leave_workers() -> None:
    """Whoever is still at work in a worker thread, such as proving an import, is not waited for:
    its client has gone, and what is remembered is written."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))


def _signalled(number: signal.Signals, stop: asyncio.Event, hurry: asyncio.Event) -> None:
    log.info("signal", name=number.name, means="hurry" if stop.is_set() else "stop")
    (hurry if stop.is_set() else stop).set()


def _settings(config: Config, listener: Listener) -> hypercorn.config.Config:
    """Hypercorn closes the listener itself, and takes no body or stream to be too slow: we do."""
    settings = hypercorn.config.Config()
    settings.bind = [f"fd://{listener.socket.detach()}"]
    settings.backlog = BACKLOG
    settings.graceful_timeout = GRACEFUL_S
    settings.shutdown_timeout = config.drain_timeout + HARD_DEADLINE_S
    settings.keep_alive_timeout = KEEP_ALIVE_S
    settings.include_server_header = False
    settings.errorlog = logging.getLogger("hypercorn.error")
    return settings


async def _first(serving: "asyncio.Task[None]", event: asyncio.Event) -> None:
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


async def _end_connections(lifespan: Lifespan, serving: "asyncio.Task[None]") -> None:
    """Hypercorn closes what has been answered.  Who does not read is cut, and if not even that
    brings Hypercorn to an end, it is."""
    if not await _within(CONNECTIONS_S, lifespan.leaving):
        log.warning("connections_aborted", count=lifespan.connections.abort())
        if not await _within(ABORTED_S, lifespan.leaving):
            serving.cancel()


async def _within(seconds: float, event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


async def _failure(serving: "asyncio.Task[None]") -> BaseException | None:
    """What Hypercorn raised, if it did.  Nothing waits for it any more."""
    await asyncio.wait({serving}, timeout=ABORTED_S)
    return serving.exception() if serving.done() and not serving.cancelled() else None
