"""Files of trained tensors: written at once, and read only by the models they were made for.

A file is safetensors; its metadata says what made it, of which models, and for which prompts. Also
here: hidden states that do not fit in memory.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from lab import files
from lab.fused import hf_tensors
from model import Transformer, UserError

ROOT = Path(__file__).resolve().parent.parent
# What `train --method` saves for use, in which file, and the tensors that are in it.
BEST = {
    "softcot": "projection.safetensors",
    "cot-unk": "prompt.safetensors",
    "lora": "adapter_model.safetensors",
}
BEST |= dict.fromkeys(("coconut", "pause", "no-cot", "cot"), "coconut.safetensors")
TENSORS = {"softcot": {"weight", "bias"}, "cot-unk": {"prompt"}}

# ------------------------------------------------------------------------------------------ files


def write_file(path: Path, content: bytes) -> None:
    files.write(path, content, "fix that, and the same command goes on from the last saved step")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict) -> None:
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_file(path, to_bytes(tensors, {"format": "pt"} | {k: str(v) for k, v in metadata.items()}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata."""
    if path.is_fifo() or path.is_dir():  # nobody may ever write to a pipe
        raise UserError(f"{path} is a {'folder' if path.is_dir() else 'named pipe'}: give a file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = file.keys()  # it is no dictionary
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"no file {path}: check the name; `train` makes one") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is no safetensors file, or damaged ({error}): make it again with `train`"
        ) from None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ----------------------------------------------------------------------------- whose files they are

# What is hashed of a layer, in this order; matrices on one line count as one.
LAYER = (
    ["input_layernorm"],
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["self_attn.q_norm"],
    ["self_attn.k_norm"],
    ["post_attention_layernorm"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
)


def fingerprint(model: Transformer) -> str:
    """The same for the same weights, wherever they lie, loaded in bfloat16 or float32."""
    tensors, some = model.starts() if hasattr(model, "starts") else hf_tensors(model), []
    groups = [["model.embed_tokens"]]
    for i in range(model.config.layers):
        groups += [[f"model.layers.{i}.{name}" for name in group] for group in LAYER]
    for group in [*groups, ["model.norm"], ["lm_head"]]:
        for kind in ("weight", "bias"):
            names = [name for name in (f"{part}.{kind}" for part in group) if name in tensors]
            if names:
                parts = [tensors[name].detach().flatten()[:256].cpu() for name in names]
                some.append(torch.cat(parts)[:256])
    some = torch.cat(some).bfloat16()
    some[some.abs() < 1e-3] = 0
    return hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def portable(name: str) -> str:
    """A bundled model's folder as seen from here; other names as they are."""
    path = Path(name).resolve()
    return str(path.relative_to(ROOT)) if path.is_dir() and path.is_relative_to(ROOT) else name


def identity(
    prompt_version: int,
    name: str,
    model: Transformer,
    assistant_name: str = "",
    assistant: Transformer | None = None,
) -> dict[str, str]:
    """Whose files these are, and for which prompts."""
    own = {"prompt_version": str(prompt_version), "model": portable(name)}
    own |= {"model_id": fingerprint(model), "d": str(model.config.d)}
    if assistant is None:
        return own
    own |= {"assistant": portable(assistant_name), "assistant_id": fingerprint(assistant)}
    return own | {"d_a": str(assistant.config.d)}


def described(who: dict[str, str], here: dict[str, str]) -> str:
    """The models of an identity that `here` has, with their widths."""
    pairs = [(name, width) for name, width in (("assistant", "d_a"), ("model", "d"))]
    said = [f"{who.get(name)} (width {who.get(width)})" for name, width in pairs if name in here]
    return " and ".join(said)


def check_made_for(path: Path, there: dict[str, str], here: dict[str, str]) -> None:
    """UserError where a file was made for other models, and a warning where for other prompts."""
    decisive = [key for key in here if key.endswith("_id") or key.startswith("d")]
    if any(there.get(key) != here[key] for key in decisive):
        made_for, others = described(there, here), described(here, here)
        if made_for == others:
            others = "other weights of the same names"
        raise UserError(
            f"{path} was made for {made_for}, not for {others}: pass those, or train for these"
        )
    trained, version = there["prompt_version"], here["prompt_version"]
    if trained != version:
        print(
            f"warning: {path} was trained with prompt version {trained}, this is {version}: "
            "expect worse answers",
            file=sys.stderr,
        )


def read_trained(
    path: Path, method: str, here: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `train --method` saved for use, and its metadata.

    UserError where it was made for other models or another method.
    """
    trained, there = read_tensors(path)
    if there.get("method") != method or trained.keys() != TENSORS[method]:
        raise UserError(
            f"{path} does not hold what `train --method {method}` makes for use, {BEST[method]} or "
            "last.safetensors: give one of these"
        )
    check_made_for(path, there, here)
    return trained, there


# --------------------------------------------------------------------------------- hidden states

CACHE_LIMIT = 8 << 30  # bytes of hidden states that are kept in memory; more are kept in a file


def kept_hidden(
    method: ModuleType,
    assistant: Transformer,
    ids: list[list[int]],
    n: int,
    path: Path,
    about: dict[str, str],
) -> Tensor:
    """h of all problems, [len(ids), n, d_a], on the CPU.

    In memory, or (above CACHE_LIMIT) in a safetensors file that is mapped into memory, and found
    again when the training goes on.
    """
    dtype, shape = assistant.embed.weight.dtype, (len(ids), n, assistant.config.d)
    size = math.prod(shape) * dtype.itemsize
    if size <= CACHE_LIMIT:
        return method.hidden_states(assistant, ids, n, torch.empty(shape, dtype=dtype))
    about = {k: about[k] for k in ("data", "assistant_id", "dtype", "thoughts")}
    if path.exists():
        tensors, there = read_tensors(path)
        if there == about:
            return tensors["hidden"]
        if there.keys() != about.keys():
            raise UserError(f"{path} is a file of something else: give --folder another name")
    short = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[dtype]
    entry = {"dtype": short, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": about, "hidden": entry}).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers behind it are aligned
    header, part = len(header).to_bytes(8, "little") + header, path.with_suffix(".part")
    length = len(header) + size
    try:
        with open(part, "wb") as file:
            file.write(header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, length)  # a full disk would crash the mapping
            whole = torch.from_file(str(part), shared=True, size=length, dtype=torch.uint8)
            out = whole[len(header) :].view(dtype).view(shape)
            method.hidden_states(assistant, ids, n, out)
            os.fsync(file.fileno())  # what was written by the mapping, too
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {size / 1e9:.1f} GB of hidden states to {path}: {error.strerror}; free "
            "some, or lower --thoughts"
        ) from None
    os.replace(part, path)
    return read_tensors(path)[0]["hidden"]


def read_adapter(
    path: Path, model: Transformer, here: dict[str, str], start: Callable
) -> tuple[dict[str, Tensor], float, str]:
    """LoRA's tensors and alpha / r, from a folder or file in PEFT's format, ours or another's.

    The third is a digest for the records; start(model, rank) makes the tensors that are expected.
    UserError where it is of another kind or model.
    """
    file = path if path.suffix == ".safetensors" else path / BEST["lora"]
    trained, there = read_tensors(file)
    try:
        config = json.loads((file.parent / "adapter_config.json").read_text())
        rank, scale = int(config["r"]), config["lora_alpha"] / config["r"]
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        raise UserError(
            f"{file.parent} has no adapter_config.json with r and lora_alpha: give the folder of "
            "an adapter"
        ) from None
    other = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern")
    if kind := [key for key in other if config.get(key)]:
        raise UserError(
            f"{file} is an adapter with {kind[0]}, supported is plain LoRA: use another"
        )
    expected = {name: x.shape for name, x in start(model, rank).items()}
    if {name: x.shape for name, x in trained.items()} != expected:
        made_for = there.get("model", config.get("base_model_name_or_path"))
        raise UserError(
            f"{file} is no adapter of q_proj and v_proj for this model, but one made for "
            f"{made_for}: pass that as --model"
        )
    if "model_id" in there:  # ours
        check_made_for(file, there, here)
    device = model.device
    return {name: x.float().to(device) for name, x in trained.items()}, scale, digest(file)
