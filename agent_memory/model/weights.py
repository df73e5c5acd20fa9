"""What a model's weight files hold, told by their headers: nothing is read into memory for it.

Any thread.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from agent_memory.errors import ModelRefused

MAX_HEADER_BYTES = 100 << 20
_FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}


def weights_bytes(folder: Path) -> int:
    """What they will take in memory: as they are, but for floats on a CPU, which become float32.

    Raises ModelRefused, naming the file, where one is missing or cut short.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ModelRefused(
            f"There are no weights (model*.safetensors) in {folder}. Download the model again, or "
            "name another folder."
        )
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return sum(_tensor_bytes(tensor, on_cpu) for file in files for tensor in _tensors(file))


def _tensors(file: Path) -> list[dict[str, Any]]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        tensors = [facts for name, facts in header.items() if name != "__metadata__"]
        end = max((facts["data_offsets"][1] for facts in tensors), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _damaged(file, "its header cannot be read") from error
    missing = 8 + length + end - file.stat().st_size
    if missing > 0:
        raise _damaged(file, f"{missing} bytes are missing at its end")
    return tensors


def _tensor_bytes(tensor: dict[str, Any], on_cpu: bool) -> int:
    start, end = tensor["data_offsets"]
    width = _FLOATS.get(tensor["dtype"])
    nbytes: int = end - start
    return nbytes * 4 // width if width and on_cpu else nbytes


def _damaged(file: Path, what: str) -> ModelRefused:
    return ModelRefused(
        f"The model in {file.parent} cannot be loaded: {file.name} is no whole safetensors file, "
        f"{what}. Download it again."
    )
