"""Tenants: between them nothing is shared, and none can tell that there are others.

Knows how their agents are called inside the server, and where the chains of each begin.  An id from
outside holds no slash, so no request can name an agent of another tenant; a chain begins with what
only the server says, so no prompt can match another tenant's blocks.  Pure; any thread.

    outside   inside      the first parent of its chains
    ada       ada         the model's fingerprint            without a tenant
    ada       acme/ada    a hash of that and of "acme"       of the tenant acme
"""

import re
from hashlib import blake2b

from agent_memory.block import HASH_BYTES, BlockHash

NAME = r"[a-z0-9-]{1,32}"
_DOMAIN = b"agent-memory-tenant-1"


def is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None


def inside(tenant: str | None, agent: str) -> str:
    """An agent id as the engine and the store have it."""
    assert "/" not in agent
    return agent if tenant is None else f"{tenant}/{agent}"


def outside(agent_id: str) -> str:
    """The same as its tenant has it."""
    return agent_id.rpartition("/")[2]


def tenant_of(agent_id: str) -> str | None:
    tenant, slash, _ = agent_id.rpartition("/")
    return tenant if slash else None


def root_of(fingerprint: BlockHash, tenant: str | None) -> BlockHash:
    """What stands before the first block of a model's chains, and of no other tenant's."""
    if tenant is None:
        return fingerprint
    data = _DOMAIN + fingerprint + tenant.encode()
    return BlockHash(blake2b(data, digest_size=HASH_BYTES).digest())
