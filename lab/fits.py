"""What fits where: the table of models, devices and 32k thoughts side by side, from shapes alone.

    python -m lab.fits

A thought of 32,768 tokens after a prompt of 256, within the model's context. A number counts whole
machines: for each the --tensor-parallel is taken, among those that divide the model and the
devices, with which most thoughts fit (lab/fast.py's plan). Devices are taken at their nominal size;
what the driver and NCCL take is in the tenth that the plan leaves.
"""

import sys

import torch

from lab import cli, flags
from lab.fast import row_bytes, weight_bytes
from lab.parallel import part_of
from model import Config, UserError, config_from_json

DEVICES = ((1, 24), (1, 80), (2, 80), (1, 141), (8, 80))  # how many, of so many GB
PROMPT, THOUGHT = 256, 32768
CUDA = torch.device("cuda")

# d, layers, heads, kv_heads, head_dim, ffn, V, tied, context: of each model's config.json
LLAMA8 = 4096, 32, 32, 8, 128, 14336, 128256, False, 131072
LLAMA70 = 8192, 80, 64, 8, 128, 28672, 128256, False, 131072
QWEN7 = 3584, 28, 28, 4, 128, 18944, 152064, False
QWEN14 = 5120, 48, 40, 8, 128, 13824, 152064, False
QWEN32 = 5120, 64, 40, 8, 128, 27648, 152064, False
SHAPES = {
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, True, 8192),
    "smollm2-360m": (960, 32, 15, 5, 64, 2560, 49152, True, 8192),
    "smollm2-1.7b": (2048, 24, 32, 32, 64, 8192, 49152, True, 8192),
    "qwen2.5-0.5b": (896, 24, 14, 2, 64, 4864, 151936, True, 32768),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 128, 8960, 151936, True, 32768),
    "r1-qwen-1.5b": (1536, 28, 12, 2, 128, 8960, 151936, False, 131072),
    "qwen2.5-3b": (2048, 36, 16, 2, 128, 11008, 151936, True, 32768),
    "qwen2.5-7b": (*QWEN7, 32768),
    "r1-qwen-7b": (*QWEN7, 131072),
    "qwen2.5-14b": (*QWEN14, 32768),
    "r1-qwen-14b": (*QWEN14, 131072),
    "qwen2.5-32b": (*QWEN32, 32768),
    "qwq-32b": (*QWEN32, 40960),
    "r1-qwen-32b": (*QWEN32, 131072),
    "qwen2.5-72b": (8192, 80, 64, 8, 128, 29568, 152064, False, 32768),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True, 40960),
    "qwen3-1.7b": (2048, 28, 16, 8, 128, 6144, 151936, True, 40960),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151936, True, 40960),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, 151936, False, 40960),
    "qwen3-14b": (5120, 40, 40, 8, 128, 17408, 151936, False, 40960),
    "qwen3-32b": (5120, 64, 64, 8, 128, 25600, 151936, False, 40960),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, True, 131072),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, True, 131072),
    "llama-3.1-8b": LLAMA8,
    "r1-llama-8b": LLAMA8,
    "llama-3.3-70b": LLAMA70,
    "r1-llama-70b": LLAMA70,
    "mistral-7b": (4096, 32, 32, 8, 128, 14336, 32768, False, 32768),
}


def config_of(alias: str) -> Config:
    """Its shapes, with what does not matter here left at a default."""
    d, layers, heads, kv_heads, head_dim, ffn, V, tied, context = SHAPES[alias]
    c = {"model_type": "qwen3" if alias.startswith("qwen3") else "llama", "hidden_size": d}
    if "qwen2.5" in alias or "qwen-" in alias or "qwq" in alias:
        c["model_type"] = "qwen2"
    c |= {"num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim}
    c |= {"num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": V}
    return config_from_json(c | {"tie_word_embeddings": tied, "max_position_embeddings": context})


def thoughts(c: Config, count: int, gigabytes: float, quantize: str | None) -> tuple[int, int]:
    """How many fit on so many devices, and with which --tensor-parallel; (0, 0): not one."""
    best = 0, 0
    for N in (n for n in range(1, count + 1) if count % n == 0):
        try:
            part = part_of(c, N)
        except UserError:  # it does not divide the model
            continue
        prompt, row = row_bytes(part, 2, CUDA, PROMPT, THOUGHT)
        free = 0.9 * (gigabytes * 1e9 - weight_bytes(part_of(c, 1), torch.bfloat16, quantize, N))
        if (total := count // N * max(0, int((free - prompt) / row))) > best[0]:
            best = total, N
    return best


def table() -> list[str]:
    heads = [f"{count} × {gigabytes} GB" for count, gigabytes in DEVICES]
    lines = [f"| alias | weights, bf16 and int8 | {' | '.join(heads)} |", "|---" * 7 + "|"]
    for alias in SHAPES:
        c, kinds = config_of(alias), (None, "int8")
        size = [f"{weight_bytes(c, torch.bfloat16, kind) / 1e9:.1f}" for kind in kinds]
        cells = [" and ".join(size) + " GB"]
        for devices in DEVICES:
            found = [thoughts(c, *devices, kind) for kind in kinds]
            cells.append(", ".join(f"{n} (N {N})" if N > 1 else str(n or "–") for n, N in found))
        lines.append(f"| `{alias}` | {' | '.join(cells)} |")
    return lines


def command(arguments: list[str]) -> int:
    flags.new_parser("lab.fits", __doc__.splitlines()[0]).parse_args(arguments)
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    cli.leave(command, sys.argv[1:])
