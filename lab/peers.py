"""What the benches run in turns with ours: transformers, llama.cpp, and BoTorch.

All are optional: one that is not installed is skipped, and never needed by the project.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from lab.fused import hf_tensors
from lab.timing import Clock
from model import Transformer, UserError

PACKAGES = {
    "transformers": "transformers",
    "llama.cpp": "llama-cpp-python gguf",
    "botorch": "botorch",
}


def made(name: str, make: Callable, *arguments: Any) -> Any:
    """make(*arguments); None, and a line on standard error, where its package is not installed."""
    try:
        return make(*arguments)
    except ImportError as error:
        remedy = f"(pip install {PACKAGES[name]})"
        print(f"{error.name} is not installed: {name} is skipped {remedy}", file=sys.stderr)
        return None


@dataclass
class Peer:
    """Another implementation of the same model."""

    version: str
    # prompt length, batch -> seconds per step; None: not at this batch size
    step: Callable[[int, int], float | None]
    prefill: Callable[[int], object]  # of a prompt of this length


# ------------------------------------------------------------------------------------ transformers


def transformers_model(folder: Path, like: Transformer) -> Any:
    """transformers' own model of the folder, on the device and in the dtype of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weight = like.embed.weight
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=weight.dtype)
    return model.to(weight.device).eval().requires_grad_(False)


def transformers_peer(folder: Path, model: Transformer, ids: list[int], tokens: int) -> Peer:
    """transformers' generate, greedy; ids: the longest prompt, whose beginnings are the others."""
    import transformers

    peer, device = transformers_model(folder, model), model.device

    def step(length: int, batch: int) -> float:
        clock = Clock()

        def tick(*_: object, **__: object) -> Tensor:
            clock()
            return torch.zeros(batch, dtype=torch.bool, device=device)

        peer.generate(
            torch.tensor([ids[:length]] * batch, device=device),
            attention_mask=torch.ones(batch, length, device=device),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            stopping_criteria=transformers.StoppingCriteriaList([tick]),
        )
        return clock.per_step()

    def prefill(length: int) -> None:
        peer.model(torch.tensor([ids[:length]], device=device))

    return Peer(f"transformers {transformers.__version__}", step, prefill)


def transformers_thoughts(
    folders: Sequence[Path],
    like: Transformer,
    sequences: Sequence[tuple[list[int], list[int], int]],
    asked: list[list[int]],
    thoughts: Callable[[Tensor], Tensor],
    n: int,
) -> Callable[[], Tensor]:
    """The loss of a SoftCoT step by transformers' modules, the assistant inside the loop.

    folders: LLM and assistant. sequences: prompt ids, label ids, where the n thoughts begin in the
    prompt. asked: what the assistant reads, its placeholders last. thoughts: [n, d_a] -> [n, d].
    """
    llm, assistant = (transformers_model(folder, like) for folder in folders)
    device, dtype = like.device, like.embed.weight.dtype

    def padded(rows: list[list[int]], filler: int = 0) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [filler] * (width - len(row)) for row in rows], device=device)

    def loss() -> Tensor:
        whole = [prompt + labels for prompt, labels, _ in sequences]
        y = padded([[-100] * len(prompt) + labels for prompt, labels, _ in sequences], -100)
        mask = padded([[1] * len(row) for row in whole])
        with torch.no_grad():
            seen = padded([[1] * len(row) for row in asked])
            out = assistant(padded(asked), attention_mask=seen, output_hidden_states=True)
        embeds = llm.get_input_embeddings()(padded(whole)).clone()
        for b, ((_, _, start), row) in enumerate(zip(sequences, asked)):
            hidden = out.hidden_states[-1][b, len(row) - n : len(row)].float()
            embeds[b, start : start + n] = thoughts(hidden).to(dtype)
        return llm(inputs_embeds=embeds, attention_mask=mask, labels=y).loss

    return loss


# --------------------------------------------------------------------------------------- llama.cpp

GGUF = {  # names in a checkpoint -> llama.cpp's in a GGUF file
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Transformer, file: Path) -> None:
    """The model as llama.cpp reads it, the same numbers, without a vocabulary.

    UserError for a model that this writer does not know.
    """
    import gguf

    c, kinds = model.config, gguf.GGMLQuantizationType
    kinds = {torch.bfloat16: kinds.BF16, torch.float32: kinds.F32}
    if c.rope["rope_type"] != "default" or model.embed.weight.dtype not in kinds:
        known = "bfloat16 and float32 models with plain RoPE only"
        raise UserError(f"llama.cpp is measured on {known}: leave it out of --against")
    kind = "llama" if c.model_type == "mistral" else c.model_type
    w = gguf.GGUFWriter(file, kind)
    w.add_context_length(c.context)
    w.add_embedding_length(c.d)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ffn)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.head_dim)
    w.add_vocab_size(c.vocab_size)
    w.add_tokenizer_model("no_vocab")
    for name, x in hf_tensors(model).items():
        stem, _, what = name.rpartition(".")
        x, renamed = x.detach().cpu(), f"{GGUF.get(stem)}.{what}"
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            renamed = f"blk.{layer}.{GGUF[part]}.{what}"
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):  # rotary pairs side by side
            x = x.view(-1, 2, c.head_dim // 2, x[0].numel()).transpose(1, 2).reshape(x.shape)
        if x.ndim == 1:
            w.add_tensor(renamed, x.float().numpy())
        else:
            raw = x.contiguous().view(torch.uint8).numpy()
            w.add_tensor(renamed, raw, raw_dtype=kinds[x.dtype])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def llama_peer(folder: Path, model: Transformer, ids: list[int], tokens: int) -> Peer:
    """llama.cpp on as many threads, greedy, one sequence; ids as of `transformers_peer`."""
    import llama_cpp

    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        write_gguf(model, file := Path(temporary) / "model.gguf")
        peer = llama_cpp.Llama(
            str(file),
            n_ctx=len(ids) + tokens,
            n_batch=512,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0 if model.device.type == "cpu" else -1,
            verbose=False,
            use_mmap=False,
        )

    def read(length: int) -> None:
        peer.reset()
        peer.eval(ids[:length])

    def step(length: int, batch: int) -> float | None:
        if batch > 1:
            return None
        read(length)
        clock = Clock()
        for _ in range(tokens):
            # Of the last position: the public way copies those of all of them.
            logits = np.ctypeslib.as_array(peer._ctx.get_logits(), (model.config.vocab_size,))
            peer.eval([int(logits.argmax())])
            clock()
        return clock.per_step()

    return Peer(f"llama-cpp-python {llama_cpp.__version__}", step, read)


PEERS = {"transformers": transformers_peer, "llama.cpp": llama_peer}

# ----------------------------------------------------------------------------------------- BoTorch


def botorch_gp(x: Tensor, y: Tensor) -> Any:
    """BoTorch's default model, fitted: x [n, d], y [n]."""
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    gp = SingleTaskGP(x, y[:, None])
    fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
    return gp


def botorch_batch() -> Callable[[Tensor, Tensor, Generator], Tensor]:
    """BoTorch's own way: its default model and qLogEI, five points optimised together.

    With 8 restarts and 256 raw samples.
    """
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.optim import optimize_acqf

    def propose(x: Tensor, y: Tensor, g: Generator) -> Tensor:
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=g)))
        best = qLogExpectedImprovement(botorch_gp(x, y), best_f=y.max())
        cube = torch.stack([torch.zeros(x.shape[1]), torch.ones(x.shape[1])]).to(x)
        return optimize_acqf(best, bounds=cube, q=5, num_restarts=8, raw_samples=256)[0]

    return propose


def botorch_picks(x: Tensor, y: Tensor, pool: Tensor) -> Callable[[], None]:
    """A round of Soft Reasoning by BoTorch: x [n, d], y [n], pool [m, d].

    Fit, log EI over the pool, the best point believed; five times, one fit.
    """
    from botorch.acquisition import LogExpectedImprovement

    def run() -> None:
        gp = botorch_gp(x, y)
        with torch.no_grad():
            for _ in range(5):
                scores = LogExpectedImprovement(gp, best_f=y.max())(pool[:, None])
                best = pool[scores.argmax()][None]
                gp = gp.condition_on_observations(best, gp.posterior(best).mean)

    return run
