"""Names of agents inside and outside, and where chains begin."""

import pytest

from agent_memory import tenants
from agent_memory.block import HASH_BYTES, Block, BlockHash, root_of, token_bytes

MODEL, OTHER = BlockHash(b"m" * HASH_BYTES), BlockHash(b"o" * HASH_BYTES)


@pytest.mark.parametrize(
    ("tenant", "agent", "inside"), [(None, "ada", "ada"), ("acme", "ada", "acme/ada")]
)
def test_a_name_inside_and_outside(tenant: str | None, agent: str, inside: str) -> None:
    assert tenants.inside(tenant, agent) == inside
    assert (tenants.tenant_of(inside), tenants.outside(inside)) == (tenant, agent)


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "a_b", ".", "..", "a" * 33, "ä", "a\n"])
def test_what_is_no_name_of_a_tenant(name: str) -> None:
    assert not tenants.is_name(name) and tenants.is_name("a-1")


@pytest.mark.requirement("S-09")
def test_each_tenant_of_each_model_has_a_root_of_its_own() -> None:
    places = [(model, name) for model in (MODEL, OTHER) for name in (None, "a", "b", "ab")]
    roots = [root_of(*place) for place in places]
    assert len(set(roots)) == len(roots) and {len(root) for root in roots} == {HASH_BYTES}
    tokens = token_bytes(range(10))
    assert len({Block.of(root, tokens).hash for root in roots}) == len(roots)


def test_without_a_tenant_the_root_is_the_fingerprint() -> None:
    """What was remembered before there were tenants stays valid."""
    assert root_of(MODEL, None) == MODEL
