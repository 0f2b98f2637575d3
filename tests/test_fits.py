"""lab/fits.py: the shapes are the published models', and the numbers what the plan allows."""

import pytest
import torch

from lab import checkpoint, fast, fits
from model import ALIASES, KVCache, UserError

PUBLISHED = {  # billions of parameters, of the model cards
    "smollm2-135m": 0.135,
    "smollm2-360m": 0.362,
    "smollm2-1.7b": 1.71,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.54,
    "r1-qwen-1.5b": 1.78,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "r1-qwen-7b": 7.62,
    "qwen2.5-14b": 14.8,
    "r1-qwen-14b": 14.8,
    "qwen2.5-32b": 32.8,
    "qwq-32b": 32.8,
    "r1-qwen-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-3.1-8b": 8.03,
    "r1-llama-8b": 8.03,
    "llama-3.3-70b": 70.6,
    "r1-llama-70b": 70.6,
    "mistral-7b": 7.25,
}


def test_every_alias_has_its_published_number_of_parameters():
    assert PUBLISHED.keys() == ALIASES.keys() == fits.SHAPES.keys()
    for alias, billions in PUBLISHED.items():
        size = fast.weight_bytes(fits.config_of(alias), torch.bfloat16, None)
        assert size / 2e9 == pytest.approx(billions, rel=0.005), alias


def test_thoughts_of_8b_by_hand():
    # Keys and values of a position: 2 x 32 layers x 8 heads x 128 x 2 bytes. 33,024 take up 40,960.
    row = 131072 * (40960 + 256) + 32 * 128256
    c = fits.config_of("llama-3.1-8b")
    layer = 2 * 256 * 4 * (4096 + 14336)  # what it makes of a prompt
    for gigabytes in (24, 80, 141):
        free = 0.9 * (gigabytes * 1e9 - 2 * 8030261248) - 131072 * 256 - layer
        assert fits.thoughts(c, 1, gigabytes, None) == (int(free / row), 1)
    assert fits.thoughts(c, 1, 16, None) == (0, 0)


def test_the_plan_allows_what_the_table_promises(monkeypatch):
    c, device = fits.config_of("qwen2.5-7b"), torch.device("cuda")
    rows, _ = fits.thoughts(c, 1, 80, None)
    free = 80e9 - fast.weight_bytes(c, torch.bfloat16, None)
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: free)

    class Model:
        config, embed = c, torch.nn.Embedding(1, 1, dtype=torch.bfloat16)
        modules = list  # none that oneDNN multiplies

    Model.device = device
    assert fast.plan(Model, rows, fits.PROMPT, fits.THOUGHT) == rows
    with pytest.raises(UserError, match=f"pass --batch-size {rows}"):
        fast.plan(Model, rows + 1, fits.PROMPT, fits.THOUGHT)
    assert KVCache.rounded(32768, device) == 32768


def test_on_eight_cards_every_part_has_its_share():
    c = fits.config_of("r1-llama-70b")
    assert fits.thoughts(c, 1, 80, None) == (0, 0)
    part = 2 * (128256 * 8192 + (70553706496 - 128256 * 8192) // 8)  # embeddings are whole
    row = 131072 // 32 * 80 // 8 * (40960 + 256) + 32 * 128256
    free = 0.9 * (80e9 - part) - 131072 // 32 * 80 // 8 * 256
    free -= 2 * 256 * 4 * (8192 + 28672 // 8)  # what a layer makes of a prompt
    assert fits.thoughts(c, 8, 80, None) == (int(free / row), 8)
