"""Pre-flight of a model: everything that a user can fix is said in one line, before it is loaded.

model.py itself refuses what it would compute wrongly; here files are found, downloaded and looked
through, so that a damaged, incomplete or foreign one is named with its remedy.
"""

import difflib
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
import safetensors
import tokenizers
import torch
from huggingface_hub import errors as hub_errors

import model as plain
from lab import native
from lab.schema import check_kinds, read_json
from model import ALIASES, KINDS, WANTED, Config, Tokenizer, Transformer, UserError

# ------------------------------------------------------------------------------- device and dtype


def choose(device: str | None, dtype: torch.dtype | str | None) -> tuple[torch.device, torch.dtype]:
    """As model.choose; UserError for a device that is not there and for an unknown dtype."""
    try:
        found = torch.device(device or "cpu")
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UserError("unknown device: use cpu, cuda, or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = f"PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s)"
        raise UserError(f"no device {device}: {count}")
    if isinstance(dtype, str) and dtype not in ("bfloat16", "float16", "float32"):
        raise UserError("unknown dtype: use bfloat16, float16, or float32")
    return plain.choose(device, dtype)


def check_compiler(patience: float = 60) -> None:
    """UserError where there is no C++ compiler, or one that gives no answer for so many seconds."""
    name, quiet = os.environ.get("CXX") or "g++", subprocess.DEVNULL
    try:
        subprocess.run(
            [*native.compiler(), *native.FLAGS, "-x", "c++", "-fsyntax-only", os.devnull],
            check=True,
            # Not pipes: what a compiler leaves running would keep them open.
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            timeout=patience,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the C++ compiler {name} gave no answer within {patience:.0f} s: name another one in "
            "the environment variable CXX, or leave --compile out"
        ) from None
    except (OSError, ValueError, subprocess.CalledProcessError):
        raise UserError(
            f"--compile on a CPU needs a compiler of C++20 with OpenMP, and {name} is not one: "
            "install g++, name another in the environment variable CXX, or leave --compile out"
        ) from None


def free_memory(device: torch.device) -> float:
    """Bytes that can be had on the device; infinite where the system does not tell."""
    if device.type == "cuda":  # what PyTorch keeps for itself without using it is free, too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return math.inf
    free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    return min(free, left_to_container())


# A container's limit, its use, and the line of memory.stat with what it can give back at once.
CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def left_to_container(process: str = "/proc/self/cgroup", mounted: str = "/sys/fs/cgroup") -> float:
    """Bytes until the limit of this process's cgroup, or of one above it; infinite without one."""
    groups, left = Path(process), math.inf
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        most, used, cached = CGROUPS[bool(controllers)]  # v1 names its controllers
        folder = Path(mounted) / ("memory" if controllers else "")
        for part in own.split("/"):
            folder = folder / part
            limit = (folder / most).read_text().strip() if (folder / most).exists() else "max"
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").open())
                taken = int((folder / used).read_text()) - int(stat.get(cached, 0))
                left = min(left, max(0, int(limit) - taken))
    return left


def check_memory(
    needed: int, device: torch.device, dtype: torch.dtype, quantize: str | None
) -> None:
    """UserError where so many bytes of weights do not fit on the device."""
    free = free_memory(device)
    if needed > free:
        int8 = "" if quantize else "--quantize int8, "
        half = int8 if dtype != torch.float32 or quantize else "--dtype bfloat16 (half of it), "
        other = "another --device" if device.type == "cuda" else "a machine with more"
        raise UserError(
            f"the weights need {needed / 1e9:.1f} GB in {quantize or str(dtype)[6:]}, "
            f"{free / 1e9:.1f} GB are free on {device}: use {half}a smaller --model, or {other}"
        )


# ----------------------------------------------------------------------------------------- files


def find_folder(name: str) -> Path:
    """The folder of a model's files, downloaded first where `name` is none.

    What is in the cache works offline. Raises UserError.
    """
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
    except (OSError, RuntimeError) as error:  # a name that no file can have, a home of nobody
        raise UserError(f"no folder {name[:80]} ({error})") from None
    repo = ALIASES.get(name.lower(), name)
    if path.is_absolute() or name.startswith(".") or repo.count("/") > 1:
        wanted = "pass a folder with config.json, tokenizer.json and *.safetensors"
        raise UserError(f"no folder {name}: {wanted}")
    if "/" not in repo:
        near = difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.3)
        raise UserError(
            f"unknown model {name}: nearest aliases are {', '.join(near) or ', '.join(ALIASES)}; "
            "or pass a Hugging Face id (owner/name) or a folder"
        )
    try:
        return Path(huggingface_hub.snapshot_download(repo, **WANTED))
    except hub_errors.GatedRepoError:
        terms = f"accept its terms at https://huggingface.co/{repo}, then run `hf auth login`"
        raise UserError(f"{repo} is gated: {terms}; or pass a folder") from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        cause = "misspelt, or private: run `hf auth login`"
        raise UserError(
            f"no repository {repo} on Hugging Face ({cause}); or pass a folder"
        ) from None
    except Exception as error:  # noqa: BLE001 (no network, no space: the classes change)
        cause = type(error).__name__
        raise UserError(
            f"cannot download {repo}, and it is not in the cache ({cause}): "
            "check the network, or pass a folder"
        ) from None


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# What each supported kind of rotary embedding must state in config.json.
ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


def check_config(folder: Path) -> Config:
    """The configuration of a model. UserError where something in it is not as it should be."""
    check_kinds(folder)
    c = read_json(folder / "config.json")
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            read_json(folder / name)
    try:
        if c.get("model_type") in KINDS:
            check_values(c)
        return plain.read_config(folder)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def check_values(c: dict[str, Any]) -> None:
    """UserError where a value is missing, or does not go with another one."""
    if missing := [name for name in SIZES if c.get(name) is None]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type"))
    if missing := [name for name in ROPE_NEEDS.get(kind, ()) if rope.get(name) is None]:
        raise UserError(f"config.json: RoPE type {kind} lacks {', '.join(missing)}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError("config.json: low_freq_factor is not below high_freq_factor")
    heads, kv_heads = c["num_attention_heads"], c.get("num_key_value_heads")
    if heads % (kv_heads or heads):
        raise UserError(f"config.json: {heads} heads cannot share {kv_heads} keys and values")
    width = c.get("head_dim") or c["hidden_size"] // heads
    if width < 2 or width % 2:
        raise UserError(f"config.json: a head is {width} wide, not an even number")


def check_files(folder: Path, config: Config) -> None:
    """UserError that says what is wrong with a folder's tokenizer or weights, if anything is."""
    check_tokenizer(folder)
    check_weights(folder, config)


def check_tokenizer(folder: Path) -> None:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
    try:
        tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 (the library raises Exception itself)
        raise UserError(f"{file} cannot be read ({error}): download it again") from None
    try:
        Tokenizer(folder)
    except Exception as error:  # noqa: BLE001 (what a parser of somebody else's program may raise)
        cause = error if isinstance(error, jinja2.TemplateError) else type(error).__name__
        raise UserError(f"{folder}: the chat template does not parse: {cause}") from None


def check_weights(folder: Path, config: Config) -> None:
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists() and index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
            raise UserError(f"{index} has no weight_map of file names: download it again")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names files outside its folder: refused")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            count = f"{len(missing)} of {len(names)} shards missing, first {missing[0]}"
            raise UserError(f"{folder}: {count}: download again")
    elif not any("consolidated" not in path.name for path in folder.glob("*.safetensors")):
        kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt")
        if pickles := sorted(path.name for kind in kinds for path in folder.glob(kind)):
            raise UserError(
                f"{folder} has only pickle weights ({pickles[0]}): refused, since a pickle can "
                "run any code; use a safetensors copy"
            )
        raise UserError(f"{folder} has no *.safetensors weights: download them, or name another")
    shapes = {}
    for path in plain.weight_paths(folder):
        try:
            with safetensors.safe_open(path, "pt") as f:  # checks header, offsets and length
                for name in f.keys():  # noqa: SIM118 (it is no dictionary)
                    # As in model.tensor_files: these may be there, too.
                    tied = name == "lm_head.weight" and config.tied
                    if tied or name.endswith("rotary_emb.inv_freq"):
                        continue
                    entry = f.get_slice(name)
                    shapes[name] = entry.get_shape()
                    if entry.get_dtype() not in ("BF16", "F16", "F32"):
                        supported = "supported: bfloat16, float16, float32 weights"
                        raise UserError(f"{path}: {name} is {entry.get_dtype()}; {supported}")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is truncated or corrupt ({error}): download it again"
            ) from None
    check_shapes(folder, config, shapes)


def check_shapes(folder: Path, config: Config, shapes: dict[str, list[int]]) -> None:
    """UserError that lists the tensors which are not those of config.json."""
    with torch.device("meta"):
        parameters = Transformer(config).named_parameters()
    expected = {plain.hf_name(name): list(p.shape) for name, p in parameters}
    both = [name for name in shapes if shapes[name] != expected.get(name, shapes[name])]
    kinds = {"missing": [name for name in expected if name not in shapes]}
    kinds["unexpected"] = [name for name in shapes if name not in expected]
    kinds["misshapen"] = [f"{name} {shapes[name]} instead of {expected[name]}" for name in both]
    said = []
    for kind, names in kinds.items():
        more = ", ..." if len(names) > 3 else ""
        said += [f"{len(names)} {kind} ({', '.join(names[:3])}{more})"] if names else []
    if said:
        raise UserError(f"{folder}: the tensors are not those of config.json: {'; '.join(said)}")
