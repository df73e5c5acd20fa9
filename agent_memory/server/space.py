"""What is one tenant's alone, beside its agents: responses, files, batches, explanations, quotas.

Each tenant has a space, and everybody without a tenant has one together.  Routes find the asker's
own in `request.state` and no other, so none can forget to look whose something is.  Event loop.
"""

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp

from agent_memory.config import Config
from agent_memory.keys import Caller
from agent_memory.server import explain, kept
from agent_memory.server.batch_runner import Batches
from agent_memory.server.explain import Explanations
from agent_memory.server.quotas import Quotas
from agent_memory.server.response_store import Responses
from agent_memory.store.documents import RESPONSES, Documents
from agent_memory.store.state_dir import StateDir

KINDS = (RESPONSES, kept.FILES, kept.BATCHES)

AllDocuments = Mapping[str | None, Mapping[str, Documents]]
State = Mapping[str, object]


def open_documents(state_dir: StateDir, config: Config) -> AllDocuments:
    """Of each tenant and kind.  A worker thread.  Raises StateDirError."""
    return {
        tenant: {kind: Documents(state_dir, kind, tenant) for kind in KINDS}
        for tenant in config.api_keys.tenants
    }


class Space:
    """`common`: what routes find whoever asks.  `has_room`: whether the disk takes so many bytes
    more."""

    def __init__(
        self,
        tenant: str | None,
        config: Config,
        documents: Mapping[str, Documents],
        app: ASGIApp,
        common: Callable[[], State],
        has_room: Callable[[int], bool],
    ) -> None:
        num_tenants = len(config.api_keys.tenants)
        self._caller = Caller(tenant)
        self._documents = documents
        self._common = common
        self._responses = Responses(documents[RESPONSES], has_room)
        self._quotas = Quotas(config.agent_requests, config.agent_requests_per_minute)
        self.explanations = Explanations(most_bytes=explain.MAX_BYTES // num_tenants)
        most = config.max_requests // num_tenants
        self.batches = Batches(app, documents, self._of_batches, most)

    def state(self) -> State:
        return {
            "batches": self.batches,
            "documents": self._documents,
            "explanations": self.explanations,
            "quotas": self._quotas,
            "responses": self._responses,
        }

    def _of_batches(self) -> State:
        """What a batch asks has been let in with it, and is never urgent."""
        return {**self._common(), **self.state(), "caller": self._caller, "quotas": Quotas()}
