"""A run of the benchmark on a model so small that nothing takes long."""

from pathlib import Path

from rich.progress import Progress

from agent_memory.bench.bench import Bench, Course, Part
from agent_memory.bench.limits import Limits
from agent_memory.bench.measured import Measured
from agent_memory.bench.models import Model, random_model
from agent_memory.bench.servers import Contender, Ours
from agent_memory.bench.texts import Pages

SMALL: dict[str, object] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def tiny_model(folder: Path) -> Model:
    return Model("tiny", str(random_model(folder / "tiny", SMALL)), endless=True)


def measured(part: Part, folder: Path, *others: Contender) -> list[Measured]:
    """By ours and these, in the shortest mode."""
    ours = Ours(folder)
    with Limits(folder) as limits, Progress(disable=True) as progress:
        bench = Bench(
            "quick",
            folder,
            [tiny_model(folder)],
            ours,
            [ours, *others],
            Pages(),
            limits,
            Course(progress, progress.add_task("", total=100)),
        )
        bench.course.begin(part.title, 100)
        part.measure(bench)
    return list(bench.notes)
