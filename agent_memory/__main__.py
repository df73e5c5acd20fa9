"""`python -m agent_memory` is the command `agent-memory`."""

from agent_memory.cli import main

raise SystemExit(main())
