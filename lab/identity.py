"""Short digests: of a model's weights and its tokenizer, for records, and of our programs."""

import hashlib
import json
from pathlib import Path

import huggingface_hub

from model import ALIASES, WANTED, read_config, weight_paths

BLOCK, BLOCKS = 4096, 16  # bytes in a row, and places in a tensor, that are read


def identified(name: str, prefix: str = "") -> dict[str, str]:
    """{"weights": ..., "tokenizer": ...}, 16 hexadecimal digits each, of a model that is loaded."""
    folder = Path(name).expanduser()
    if not folder.is_dir():  # `load` has downloaded it: nothing is asked for again
        repo = ALIASES.get(name.lower(), name)
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True, **WANTED))
    return {f"{prefix}weights": weights(folder), f"{prefix}tokenizer": tokenizer(folder)}


def weights(folder: Path) -> str:
    """Of what computes: config.json as it is understood, and the tensors, in however many files.

    Of each tensor: name, dtype, shape, and at most 16 blocks of 4 KB, evenly spread from its first
    byte to its last. So a 60 GB model takes a fraction of a second once its files have been read.
    Another training, merge or rounding is seen, as is every change of a tensor of up to 64 KB; a
    change of a few numbers between the blocks of a larger one is not.
    """
    seen = hashlib.sha256(repr(read_config(folder)).encode())
    found = []
    for path in weight_paths(folder):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header, start = json.loads(file.read(size)), 8 + size
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                first, last = tensor["data_offsets"]
                spread = range(BLOCKS)
                if last - first > BLOCK * BLOCKS:
                    places = [first + i * (last - first - BLOCK) // (BLOCKS - 1) for i in spread]
                else:
                    places = range(first, last, BLOCK)
                blocks = hashlib.sha256()
                for place in places:
                    file.seek(start + place)
                    blocks.update(file.read(min(BLOCK, last - place)))
                found.append((name, tensor["dtype"], tensor["shape"], blocks.hexdigest()))
    seen.update(json.dumps(sorted(found)).encode())
    return seen.hexdigest()[:16]


def code() -> str:
    """Of this repository's programs and tests, 12 hexadecimal digits."""
    seen, root = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for folder in (root, *(root / name for name in ("lab", "baselines", "tests"))):
        for path in sorted(folder.glob("*")):
            if path.suffix in (".py", ".cpp", ".h"):
                seen.update(path.read_bytes())
    return seen.hexdigest()[:12]


def tokenizer(folder: Path) -> str:
    """Of the files that make prompts: the tokenizer's two, and the chat template's."""
    seen = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        seen.update(f"{name} {len(content)} ".encode() + content)
    return seen.hexdigest()[:16]
