"""Every error this project raises on purpose, in one tree.

    AgentMemoryError
    ├── RequestError          one request cannot be served; carries its HTTP status
    │   ├── BadRequest            400  the caller's fault
    │   │   ├── UnsupportedParameter
    │   │   ├── ContextLengthExceeded
    │   │   └── MemoryExceeded
    │   ├── NotFound              404
    │   ├── Conflict              409  what is there stands against it
    │   ├── Refused               turned away before any route saw it; with its own status
    │   │   └── Unauthorized          401  a key is missing or wrong
    │   ├── Unavailable           503  not now: loading, draining, full; says when to come back
    │   │   └── TooManyRequests       429  one agent asks more than it may
    │   └── EngineFailed          500  our fault; the engine goes on for the others
    ├── StartError            the process cannot start; carries its exit status
    │   ├── UsageError            64
    │   ├── RequestRefused        1   the server said no to a command
    │   ├── PortInUse             69
    │   ├── NoServer              69
    │   ├── StateDirError         73
    │   ├── StateDirLocked        75
    │   ├── ConfigError           78
    │   └── ServerFailed          70  the server that a command started or asked
    └── ModelRefused          a model that cannot be loaded or cannot be proven right

A damaged block is none of these: it is a miss.  Messages tell the reader what to do next.
Any thread.
"""


class AgentMemoryError(Exception):
    """Base of all of ours."""


class RequestError(AgentMemoryError):
    """`param` is the field of the request at fault, `code` a word for programs."""

    status = 500
    type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class BadRequest(RequestError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameter(BadRequest):
    code = "unsupported_parameter"

    def __init__(self, field: str) -> None:
        super().__init__(
            f"'{field}' is not supported by this server yet, and ignoring it would change the "
            f"answer. Remove '{field}' from the request.",
            param=field,
        )


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"

    def __init__(self, prompt_tokens: int, context_length: int) -> None:
        super().__init__(
            f"The prompt has {prompt_tokens} tokens and the model's context holds "
            f"{context_length}, of which at least one must stay free for the answer. "
            "Shorten the conversation; nothing is cut off silently.",
            param="messages",
        )


class MemoryExceeded(BadRequest):
    code = "memory_exceeded"

    def __init__(self, prompt_tokens: int, num_tokens: int, most_tokens: int) -> None:
        super().__init__(
            f"With its {prompt_tokens} tokens of prompt this request needs memory for {num_tokens} "
            f"tokens, and this server has enough for {most_tokens}, even with nothing else to do. "
            "Shorten the conversation, ask for fewer tokens, or start the server with more "
            "--memory-bytes or fewer --kv-bits.",
            param="messages",
        )


class NotFound(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class Conflict(RequestError):
    status = 409
    type = "invalid_request_error"
    code = "conflict"


class Refused(RequestError):
    """Turned away at the gate.  `close`: the connection cannot be used again."""

    type = "invalid_request_error"

    def __init__(self, status: int, code: str, message: str, *, close: bool = False) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.close = close


class Unauthorized(Refused):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(401, code, message)


class Unavailable(RequestError):
    """`reason`: loading, draining, queue_full, failed, crash_loop, busy, not_written.
    `retry_after`: whole seconds."""

    status = 503
    type = "server_error"

    def __init__(self, message: str, *, reason: str, retry_after: int) -> None:
        super().__init__(message, code=reason)
        self.reason = reason
        self.retry_after = retry_after


class TooManyRequests(Unavailable):
    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message, reason="rate_limit_exceeded", retry_after=retry_after)


class EngineFailed(RequestError):
    code = "engine_error"


class ModelRefused(AgentMemoryError):
    pass


class StartError(AgentMemoryError):
    exit_code = 70


class UsageError(StartError):
    exit_code = 64


class PortInUse(StartError):
    exit_code = 69


class RequestRefused(StartError):
    exit_code = 1


class NoServer(StartError):
    exit_code = 69


class StateDirError(StartError):
    exit_code = 73


class StateDirLocked(StartError):
    exit_code = 75


class ConfigError(StartError):
    exit_code = 78


class ServerFailed(StartError):
    pass
