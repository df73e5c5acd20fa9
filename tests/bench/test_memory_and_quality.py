"""Both parts, run as a user would."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "agent_memory", "bench", "--mode", "quick"]
    command += ["--only", "memory,quality", "--out", str(out)]
    subprocess.run(command, check=True, timeout=280)
    results: dict[str, Any] = json.loads((out / "latest.json").read_text())
    return results


def of_bits(results: dict[str, Any], part: str, name: str) -> dict[str, dict[str, Any]]:
    found = [one for one in results[part]["measured"] if one["name"] == name]
    return {one["at"]["kv_bits"]: one for one in found}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_fewer_bits_take_less_and_lose_little(tmp_path: Path) -> None:
    results = run(tmp_path)
    for name in ("kept per token", "on disk per token", "written per token"):
        each = of_bits(results, "memory", name)
        medians = [each[bits]["median"]["agent-memory"] for bits in ("none", "8", "4")]
        limits = [each[bits]["limit"] for bits in ("none", "8", "4")]
        assert medians == sorted(medians, reverse=True)
        assert all(
            limit < median < 1.5 * limit for limit, median in zip(limits, medians, strict=True)
        )
    fitting = of_bits(results, "memory", "agents in RAM")
    counts = [fitting[bits]["median"]["agent-memory"] for bits in ("none", "8", "4")]
    assert counts == sorted(set(counts))
    for one in of_bits(results, "quality", "perplexity").values():
        assert one["median"]["agent-memory"] == pytest.approx(one["limit"], rel=0.1)
    whole = of_bits(results, "quality", "perplexity")["none"]
    assert whole["median"]["agent-memory"] == pytest.approx(whole["limit"], rel=1e-3)
    for one in of_bits(results, "quality", "restored share of prompts").values():
        assert one["median"]["agent-memory"] > 0.9
