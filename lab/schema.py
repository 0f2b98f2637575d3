"""What JSON files may hold, a model's and our results: tables of field, type and range."""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from model import UserError


class Or(tuple):
    """One of several."""


SIZE, MANY, POSITIVE = (1, 100_000), (1, 10**9), (1e-9, 1e9)
IDS = [(int, (0, 2**31))]
TEXT = Or((str, {"content": str}, bool))  # of a special token
# Of the rotary embedding, in config.json's rope_scaling or rope_parameters.
ROPE = {
    "rope_type": str,
    "type": str,
    "factor": (float, POSITIVE),
    "low_freq_factor": (float, POSITIVE),
    "high_freq_factor": (float, POSITIVE),
    "original_max_position_embeddings": (int, MANY),
    "beta_fast": (float, POSITIVE),
    "beta_slow": (float, POSITIVE),
    "attention_factor": (float, POSITIVE),
    "rope_theta": (float, (1.001, 1e30)),
    "partial_rotary_factor": (float, (0, 1)),
}
FIELDS = {
    "config.json": {
        "model_type": str,
        "hidden_act": str,
        "architectures": [str],
        "vocab_size": (int, (1, 10**8)),
        "hidden_size": (int, SIZE),
        "num_hidden_layers": (int, (1, 1000)),
        "num_attention_heads": (int, SIZE),
        "num_key_value_heads": (int, SIZE),
        "head_dim": (int, SIZE),
        "intermediate_size": (int, (1, 10**7)),
        "max_position_embeddings": (int, MANY),
        "rms_norm_eps": (float, (0, 1)),
        "rope_theta": (float, (1.001, 1e30)),
        "partial_rotary_factor": (float, (0, 1)),
        "rope_scaling": ROPE,
        "rope_parameters": ROPE,
        "sliding_window": (int, (0, 10**9)),
        "use_sliding_window": bool,
        "tie_word_embeddings": bool,
        "attention_bias": bool,
        "mlp_bias": bool,
        "eos_token_id": IDS,
    },
    "generation_config.json": {"eos_token_id": IDS},
    "tokenizer_config.json": {
        "chat_template": Or((str, [{"name": str, "template": str}])),
        **{f"{name}_token": TEXT for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    },
    "model.safetensors.index.json": {},
}
COUNT = (int, (0, 10**12))
RECORD = {  # of a result file: what is read of it again
    "method": str,
    "problem": str,
    "sample": COUNT,
    "question": str,
    "choices": {},
    "correct": bool,
    "thought_text": str,
    "answer_text": str,
    "thought_tokens": COUNT,
    "answer_tokens": COUNT,
    "seconds": (float, (0, 1e12)),
    "stopped_by": str,
    "settings": {"task": str, "cold_stop_entropy": float, "cold_stop_steps": int},
}
GIVEN = ("method", "problem", "sample", "correct", "settings")  # never null
SAID = {"text": str, "tokens": COUNT}  # a search's verdicts
POINT = SAID | {"round": COUNT, "reward": float}
NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
OTHERS = ("tokenizer.json", "chat_template.jinja", "*.safetensors")


def check_kinds(folder: Path) -> None:
    """UserError for a folder, a pipe or a link to nothing where a file is due."""
    for path in folder.iterdir():
        read = any(fnmatch(path.name, name) for name in (*FIELDS, *OTHERS))
        if read and not path.is_file():
            raise UserError(f"{path} is not a regular file: put the model's file there")


def read_json(path: Path) -> dict:
    """The object in a JSON file. UserError where it is none, or a field is not as in FIELDS."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        kind = "not a Hugging Face model folder"
        raise UserError(f"{path.parent} has no {path.name}: {kind}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply: download it again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    if fault := first_fault(content, FIELDS.get(path.name, {})):
        raise UserError(f"{path}: {fault}: download it again")
    return content


def first_fault(content: dict, fields: dict[str, Any], inside: str = "") -> str | None:
    """The first field that is there, is not null, and has another type or range than its own."""
    for name, wanted in fields.items():
        value = content.get(name)
        if value is not None and (fault := misfit(inside + name, value, wanted)):
            return fault
    return None


def misfit(name: str, value: Any, wanted: Any) -> str | None:
    """What a value is that is not wanted, and what is; None for one that fits.

    wanted: a type, a type and its range, a dict of fields, Or of several, or a list of what a
    list's items (or the value itself, where it is no list) must be.
    """
    if isinstance(wanted, Or):
        faults = [misfit(name, value, one) for one in wanted]
        return None if None in faults else faults[0]
    if isinstance(wanted, list):
        items = value if isinstance(value, list) else [value]
        return next(filter(None, (misfit(name, item, wanted[0]) for item in items)), None)
    if isinstance(wanted, dict):
        if isinstance(value, dict):
            return first_fault(value, wanted, f"{name}.")
        return f"{name} is {shown(value)}, not an object"
    kind, limits = wanted if isinstance(wanted, tuple) else (wanted, None)
    fits = isinstance(value, (int, float) if kind is float else kind)
    fits = fits and (kind is bool or not isinstance(value, bool))  # True is an int, too
    if fits and (limits is None or limits[0] <= value <= limits[1]):
        return None
    between = f" from {limits[0]:g} to {limits[1]:g}" if limits else ""
    return f"{name} is {shown(value)}, not {NAMES[kind]}{between}"


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def check_record(record: dict) -> None:
    """Raise ValueError, TypeError or KeyError for a record that no program of ours wrote."""
    faults = [first_fault(record, RECORD)]
    faults += [misfit(name, record[name], RECORD[name]) for name in GIVEN if name in record]
    for name, fields in (("points", POINT), ("verdicts", SAID)):
        for said in record.get(name) or ():
            faults += [misfit(field, said[field], wanted) for field, wanted in fields.items()]
            _ = said["answer"]
    if "texts" in record:
        texts, weights = record["texts"], record.get("weights") or [1.0] * len(record["texts"])
        faults += [misfit("texts", texts, [str]), misfit("weights", weights, [float])]
        if not isinstance(texts, list) or not texts or len(weights) != len(texts):
            raise ValueError("no texts, or not as many weights")
    if ("texts" in record or "points" in record) and not isinstance(record["answers"], list):
        raise TypeError
    if fault := next(filter(None, faults), None):
        raise ValueError(fault)
