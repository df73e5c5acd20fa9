"""How a model would be served, found out by loading it here: `agent-memory models probe`.

Main thread, which is the only one to use MLX then.
"""

import json
import sys

from agent_memory.errors import AgentMemoryError
from agent_memory.model import footprint, loader
from agent_memory.model.loader import Prepared, Progress
from agent_memory.model.probe import Proven
from agent_memory.model_source import parse

EXIT_REFUSED = 1


def main(source: str, kv_bits: int | None, group_size: int, *, as_json: bool) -> int:
    try:
        prepared = loader.prepare(parse(source), _tell)
        loaded = loader.finish(loader.load(prepared, kv_bits, group_size, _tell))
    except (AgentMemoryError, OSError, ValueError) as error:
        sys.stderr.write(f"agent-memory: {source} is refused: {error}\n")
        return EXIT_REFUSED
    facts = _facts(prepared, loaded.proven, footprint.weights_bytes(loaded.model))
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        width = max(map(len, facts))
        sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in facts.items())
    return 0


def _tell(progress: Progress) -> None:
    layers = f" {progress.done}/{progress.of}" if progress.of else ""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{progress.step}{layers}")
        sys.stderr.write("\r\x1b[K" if progress.step == "self-test" else "")


def _facts(prepared: Prepared, proven: Proven, weights_bytes: int) -> dict[str, object]:
    """`group_bits`: of K and V in each group of layers; 0 where they stay as they are."""
    spec = proven.spec
    return {
        "model": prepared.name,
        "folder": str(prepared.path),
        "weights_bytes": weights_bytes,
        "context_length": prepared.context_length,
        "mode": proven.mode,
        "decode_reads": proven.read,
        "kv_bytes_per_token": spec.bytes_per_token,
        "state_bytes": spec.state_bytes,
        "groups": [
            {
                "kind": group.kind,
                "layers": len(group.layers),
                "window": group.window,
                "k_bits": group.k.bits or 0,
                "v_bits": group.v.bits or 0,
            }
            for group in spec.groups
        ],
        "self_test_difference": proven.worst_difference,
        "fingerprint": spec.fingerprint.hex()[:16],
    }
