"""Every metric the server exports, in one registry.

Prometheus text is made by the library; here is only the list.  Counters are safe from any thread.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"agent_memory_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"agent_memory_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"agent_memory_{name}_seconds", text, registry=registry)

        self.requests = counter("requests", "Requests that ended", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens from memory", "tier")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.steps = counter("steps", "Forward passes")
        self.step_failures = counter("step_failures", "Forward passes that raised")
        self.restore_rejected = counter(
            "restore_rejected", "Blocks found on disk and not used", "reason"
        )
        self.blocks_committed = counter("blocks_committed", "Blocks copied out to the pool")
        self.commits_skipped = counter("commits_skipped", "Blocks the full pool had no room for")
        self.blocks_written = counter("blocks_written", "Blocks written to disk")
        self.bytes_written = counter("bytes_written", "Bytes of block files written to disk")
        self.writes_skipped = counter(
            "writes_skipped", "Blocks not written because a limit was reached", "reason"
        )
        self.evicted_blocks = counter(
            "evicted_blocks", "Block files deleted because of a limit", "reason"
        )
        self.scrubbed = counter("scrubbed", "Block files read only to see whether they are good")
        self.persist_errors = counter("persist_errors", "Writes that failed", "errno")
        self.orphans_swept = counter("orphans_swept", "Unfinished files removed at start")
        self.running = gauge("running", "Sequences being computed")
        self.waiting = gauge("waiting", "Sequences waiting to be computed")
        self.runs = gauge("runs", "Restored prefixes in use, each once however many share it")
        self.pool_bytes = gauge("pool_bytes", "Payload bytes in the block pool")
        self.disk_bytes = gauge("disk_bytes", "Bytes of block files")
        self.disk_budget = gauge("disk_budget_bytes", "Bytes of block files allowed")
        self.memory_budget_bytes = gauge("memory_budget_bytes", "Memory for everything together")
        self.memory_used_bytes = gauge("memory_used_bytes", "Memory of it that is in use or kept")
        self.models_resident = gauge("models_resident", "Models in memory")
        self.model_loads = counter("model_loads", "Models brought into memory", "model")
        self.model_unloads = counter("model_unloads", "Models taken out of memory", "model")
        self.model_failures = counter("model_failures", "Loads that failed", "model")
        self.model_load_time = seconds("model_load", "From asking for a model to having it")
        self.preemptions = counter("preemptions", "Sequences sent back to wait for want of room")
        self.engine_turn_age = gauge(
            "engine_turn_age_seconds", "Since the engine's last turn ended; 0 at rest"
        )
        self.unclean_starts = gauge("unclean_starts", "Bad ends here in the last ten minutes")
        self.connections = gauge("connections", "Open HTTP connections")
        self.stalled_connections = gauge(
            "stalled_connections", "Connections whose client does not read what it is sent"
        )
        self.connections_cut = gauge("connections_cut", "Connections cut off for not reading")
        self.connections_closed = gauge("connections_closed", "So far, before they asked", "reason")
        self.time_to_first_token = seconds("time_to_first_token", "From submit to the first token")
        self.restore_time = seconds("restore_time", "From match to the run in place")

    def text(self) -> bytes:
        return generate_latest(self.registry)
