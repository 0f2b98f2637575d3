"""What 8 bits cost: how far a model with weights in 8 bits is from the same without."""

import math

import torch
import torch.nn.functional as F

from lab import flags
from model import Tokenizer, Transformer


@torch.inference_mode()
def quality(model: Transformer, tokenizer: Tokenizer, exact: Transformer) -> str:
    """Perplexity, and agreement of the greedy tokens.

    On the text of README.md and tiny/README.md, in pieces of 512 tokens.
    """
    texts = [(flags.ROOT / name).read_text("utf-8") for name in ("README.md", "tiny/README.md")]
    ids = torch.tensor(tokenizer.encode("\n".join(texts)), device=model.device)
    loss, same, count = [0.0, 0.0], 0, 0
    for piece in ids.split(512):
        logits = [m.logits(m(m.embed(piece[None]))[0, :-1]) for m in (exact, model)]
        lost = [F.cross_entropy(x, piece[1:], reduction="sum").item() for x in logits]
        loss = [a + b for a, b in zip(loss, lost)]
        same += (logits[0].argmax(-1) == logits[1].argmax(-1)).sum().item()
        count += len(piece) - 1
    without, with_ = (math.exp(x / count) for x in loss)
    perplexity = f"perplexity {with_:.3f}, without it {without:.3f}"
    agreement = f"greedy tokens agree at {same / count:.1%} of the positions"
    return f"int8 on {count} tokens of the READMEs: {perplexity}; {agreement}"
