"""Tenants: what belongs to one is to another as if it were not there.

Knows how their agents are called inside the server.  An id from outside holds no slash, so no
request can name an agent of another tenant; and no prompt can match another tenant's blocks, for
where its chains begin (`root_of` in block.py) is up to the server.  Pure; any thread.

    outside   inside
    ada       ada         without a tenant
    ada       acme/ada    of the tenant acme
"""

import re

NAME = r"[a-z0-9-]{1,32}"


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
