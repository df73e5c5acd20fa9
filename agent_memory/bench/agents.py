"""What a server of ours says it remembers of an agent.

Knows the answer of `GET /v1/agents/{id}`.  Main thread.
"""

from dataclasses import dataclass

import httpx

from agent_memory.bench.servers import Server


@dataclass(frozen=True, slots=True)
class Kept:
    """Of all that the agent has said: how much is in RAM (tokens), how much not on disk yet
    (tokens), and the bytes of its files.
    """

    memory: int
    unwritten: int
    num_bytes: int


def kept(server: Server, agent: str) -> Kept:
    answer = httpx.get(f"{server.url}/v1/agents/{agent}", trust_env=False, timeout=30)
    entry = answer.raise_for_status().json()
    heads = entry["heads"]
    return Kept(
        sum(head["tiers"]["memory"] for head in heads),
        sum(head["tokens"] - head["tiers"]["disk"] for head in heads),
        entry["bytes"],
    )
