"""Models of random weights in the shapes of real ones, for what depends on shapes alone.

Written as safetensors by the standard library, a file for each layer, as fast as the disk takes
them: 15 GB for a model of 7 billion parameters.
"""

import json
import math
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from lab import files, flags
from model import Transformer, UserError, config_from_json, hf_name

QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
LARGE = {  # Qwen2.5-7B's and Qwen2.5-0.5B's
    "random-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "random-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
TINY = {"num_hidden_layers": 2, "hidden_size": 56, "intermediate_size": 96, "vocab_size": 2048}
SHAPES = LARGE | {f"{name}-tiny": shape | TINY for name, shape in LARGE.items()}


def folder_of(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"lab-bench-{name}"


def made(name: str | None) -> str | None:
    """A name for `load`: of one of SHAPES its folder, which is written; else as it is."""
    return str(write(name)) if name in SHAPES else name


def write(name: str) -> Path:
    """The folder of one of SHAPES, in bfloat16, with the bundled model's tokenizer.

    The index comes last: with it the folder is whole, and a later call writes nothing. Raises
    UserError where the weights do not fit on the disk.
    """
    folder, config = folder_of(name), QWEN2 | SHAPES[name]
    index = folder / "model.safetensors.index.json"
    if index.exists() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    with torch.device("meta"):
        parameters = Transformer(config_from_json(config)).named_parameters()
    shapes = {hf_name(name): tuple(p.shape) for name, p in parameters}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed, free = 2 * sum(map(math.prod, shapes.values())), shutil.disk_usage(folder).free
    if needed > free:
        there = f"{needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB are free"
        raise UserError(f"cannot write {folder}: {there}; set TMPDIR to a larger disk")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(flags.TINY) / file, folder)
    files.write_json(folder / "config.json", config)
    shards: dict[str, dict[str, tuple]] = {}
    for tensor, shape in shapes.items():
        layer = tensor.split(".")[2] if tensor.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", {})[tensor] = shape
    # The same noise for all of them, again and again: drawing takes long.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 24, generator=generator).mul_(0.02).bfloat16()
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda x: write_tensors(folder / x[0], x[1], noise), shards.items()):
            pass
    places = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    files.write_json(index, {"metadata": {"total_size": needed}, "weight_map": places})
    return folder


def write_tensors(path: Path, shapes: dict[str, tuple], noise: torch.Tensor) -> None:
    """A safetensors file of bfloat16 tensors: norms are 1, everything else repeats the noise."""
    header, at = {}, 0
    for name, shape in shapes.items():
        offsets = [at, at + 2 * math.prod(shape)]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            source = torch.ones(shape).bfloat16() if "norm" in name else noise
            block, left = memoryview(source.view(torch.uint8).numpy()), 2 * math.prod(shape)
            while left:
                left -= file.write(block[:left])
