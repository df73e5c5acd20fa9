"""Three conversations as three kinds of client and template render them, each part changeable."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tests.conftest import ordinary_text

Tool = dict[str, Any]


def tool(name: str, text: str) -> Tool:
    parameters = {"type": "object"}
    return {
        "type": "function",
        "function": {"name": name, "description": text, "parameters": parameters},
    }


TOOLS = [
    tool("read", "Read a file and return its text."),
    tool("read_all", "Read every file of a folder."),
    tool("write", "Write text to a file, after a read."),
    tool("search", "Find files by words in them."),
]


def json_lines(tools: list[Tool]) -> str:
    return "<tools>\n" + "\n".join(json.dumps(tool) for tool in tools) + "\n</tools>\n"


def json_list(tools: list[Tool]) -> str:
    return "Available tools:\n" + json.dumps([tool["function"] for tool in tools], indent=2) + "\n"


def declared(tools: list[Tool]) -> str:
    functions = [tool["function"] for tool in tools]
    lines = [f"// {f['description']}\ntype {f['name']} = (_: Path) => any;" for f in functions]
    return "namespace functions {\n" + "\n".join(lines) + "\n}\n"


@dataclass(frozen=True)
class Talk:
    """`thought` is the whole of it, tags and all; `dropped` what the template leaves of it."""

    name: str
    system: str
    later_system: str
    user: str
    thought: str
    dropped: str
    reply: str
    show_tools: Callable[[list[Tool]], str]
    tools: list[Tool] = field(default_factory=lambda: list(TOOLS))

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.user},
            {"role": "assistant", "content": self.reply},
            {"role": "user", "content": "And what else?"},
        ]

    def first(self) -> str:
        """Up to where the model answers."""
        opening = f"<|im_start|>system\n{self.show_tools(self.tools)}{self.system}<|im_end|>\n"
        return f"{opening}<|im_start|>user\n{self.user}<|im_end|>\n<|im_start|>assistant\n"

    def answered(self) -> str:
        return f"{self.first()}{self.thought}{self.reply}<|im_end|>"

    def second(self, thought: str | None = None) -> str:
        """The next turn; `thought`: what is sent again of the answer's."""
        kept = self.thought if thought is None else thought
        end = "<|im_start|>user\nAnd what else?<|im_end|>\n<|im_start|>assistant\n"
        return f"{self.first()}{kept}{self.reply}<|im_end|>\n{end}"

    def but(self, **changes: Any) -> "Talk":
        return replace(self, **changes)


_PAGES = ordinary_text()

TALKS = [
    Talk(
        "coder",
        "You write code. Today's date: 2026-11-20. The folder is /src.\n" + _PAGES[:200],
        "You write code. Today's date: 2026-11-21. The folder is /src.\n" + _PAGES[:200],
        "Rename the function.",
        "<think>\nThe user wants a rename. I look first.\n</think>\n\n",
        "",
        "I renamed it in two files.",
        json_lines,
    ),
    Talk(
        "diarist",
        "It is Friday, November 20, 2026, 9:59 AM. You keep a diary and answer kindly.",
        "It is Saturday, November 21, 2026, 10:04 PM. You keep a diary and answer kindly.",
        "How was my week?\n" + _PAGES[5000:5200],
        "<think>\nThey had a hard week, as the pages say.\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "It was a long one, but it ended well.",
        json_list,
    ),
    Talk(
        "runner",
        "Step 9 of 120 in session a81f-33: go on with the plan.\n" + _PAGES[9000:9600],
        "Step 10 of 120 in session a81f-33: go on with the plan.\n" + _PAGES[9000:9600],
        "What is next?",
        "<|channel|>analysis<|message|>Next is the test.<|end|><|start|>assistant",
        "",
        "<|channel|>final<|message|>Run the test.",
        declared,
    ),
]
