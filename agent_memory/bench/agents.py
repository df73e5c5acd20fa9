"""What a server of ours says it remembers of an agent.

Knows the answer of `GET /v1/agents/{id}`.  Main thread.
"""

from dataclasses import dataclass

import httpx

from agent_memory.bench.servers import Server


@dataclass(frozen=True, slots=True)
class Kept:
    """`memory`: how many tokens of all that it has said are in RAM.  `num_bytes`: of its files."""

    memory: int
    num_bytes: int


def kept(server: Server, agent: str) -> Kept:
    answer = httpx.get(f"{server.url}/v1/agents/{agent}", trust_env=False, timeout=30)
    entry = answer.raise_for_status().json()
    return Kept(sum(head["tiers"]["memory"] for head in entry["heads"]), entry["bytes"])
