"""How `tests/golden/` was made: small random checkpoints of every architecture.

    pip install transformers==5.23.0 && python tests/make_golden.py

Each folder holds a config.json (written here, in the style of transformers 4 or 5),
model.safetensors (bfloat16, drawn with torch seed 0 and wide enough for attention to be far from
uniform), and expected.safetensors: 40 token ids, the final hidden states [40, d] and the logits of
the last 8 positions [8, V] that transformers computes in float32. The suite itself needs no
transformers.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 272,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "bfloat16",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def version5(config, **rope):
    config = {
        k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    return config | {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0} | rope,
    }


FAMILIES = {
    "llama2": BASE | {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": BASE
    | {"model_type": "llama", "rope_scaling": LLAMA3, "head_dim": 8, "tie_word_embeddings": True},
    "llama3-v5": version5(BASE | {"model_type": "llama"}, **LLAMA3),
    "llama-linear": BASE
    | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama-bias": BASE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen2": BASE
    | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 64,
        "tie_word_embeddings": True,
    },
    "qwen2-yarn": BASE | {"model_type": "qwen2", "rope_scaling": YARN | {"type": "yarn"}},
    "qwen3": BASE
    | {"model_type": "qwen3", "head_dim": 16, "sliding_window": None, "use_sliding_window": False},
    "qwen3-v5-yarn": version5(
        BASE | {"model_type": "qwen3", "head_dim": 16}, **YARN, rope_type="yarn"
    ),
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 16},
}

# As released, since the small models above have too few frequencies for every part of a formula.
REAL = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32}
REAL |= {"intermediate_size": 1, "num_hidden_layers": 1, "vocab_size": 1}
OTHER = {"factor": 2.0, "beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5}
ROPES = {  # theta, width of a head, positions before the stretching, and how it is done
    "llama-3.1-8b": (500000.0, 128, 8192, LLAMA3),
    "llama-3.2-1b": (500000.0, 64, 8192, LLAMA3 | {"factor": 32.0}),
    "qwen2.5-7b": (1000000.0, 128, 32768, {"rope_type": "yarn", "factor": 4.0}),
    "another yarn": (10000.0, 96, 4096, {"rope_type": "yarn"} | OTHER),
    "linear": (10000.0, 128, 8192, {"rope_type": "linear", "factor": 4.0}),
}


def rope_config(name):
    theta, head_dim, original, rope = ROPES[name]
    rope = rope | {"original_max_position_embeddings": original}
    config = {"head_dim": head_dim, "max_position_embeddings": original, "rope_theta": theta}
    return REAL | config | {"rope_scaling": rope}


def main():
    from transformers import (  # here: the tests import FAMILIES without it
        AutoConfig,
        AutoModelForCausalLM,
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = {}
    for name, (*_, rope) in ROPES.items():
        config = AutoConfig.for_model(**rope_config(name))
        found[name], factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
        found[f"{name}, factor"] = torch.tensor(factor)
    save_file(found, Path(__file__).parent / "golden" / "rope.safetensors")

    for name, config in FAMILIES.items():
        folder = Path(__file__).parent / "golden" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32
        ).eval()
        weights = {}
        for key, w in model.state_dict().items():
            drawn = (
                torch.rand(w.shape) + 0.5
                if "norm" in key
                else torch.randn(w.shape) * (0.3 if "bias" in key else 0.2)
            )
            if key == "lm_head.weight" and config["tie_word_embeddings"]:
                continue
            weights[key] = drawn.bfloat16()
        model.load_state_dict({k: w.float() for k, w in weights.items()}, strict=False)
        model.tie_weights()
        ids = torch.randint(0, config["vocab_size"], (40,))
        with torch.no_grad():
            out = model(ids[None], output_hidden_states=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        save_file(
            {
                "ids": ids,
                "hidden": out.hidden_states[-1][0].contiguous(),
                "logits": out.logits[0, -8:].contiguous(),
            },
            folder / "expected.safetensors",
        )


if __name__ == "__main__":
    main()
