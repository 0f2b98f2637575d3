"""Small models and tokenizers for the tests: golden checkpoints of every architecture, and a byte-level tokenizer."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(folder: Path, thinking: bool, template: str = TEMPLATE) -> None:
    """Bytes as tokens 0..255, then special ones; with `thinking` also <think> and </think>.  272 tokens at most."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])  # 256, 257
    if thinking:
        core.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])  # 258, 259
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}))


@pytest.fixture
def folder_of(tmp_path):
    """A copy, that a test may spoil, of a golden model with a tokenizer: folder_of("qwen2", thinking=True)."""

    def make(family: str, thinking: bool = True, name: str | None = None) -> Path:
        folder = tmp_path / (name or family)
        shutil.copytree(GOLDEN / family, folder)
        (folder / "expected.safetensors").unlink()
        write_tokenizer(folder, thinking)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 261]}))
        return folder

    return make
