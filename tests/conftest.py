"""Small models and tokenizers for the tests: golden checkpoints, and a byte-level tokenizer."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: kernels run on a CPU

import model
from lab import native
from lab.steps import Recorder

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, thinking: bool, template: str = TEMPLATE) -> None:
    """Bytes as tokens 0..255, then special ones; with `thinking` also <think> and </think>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])  # 256, 257
    if thinking:
        core.add_tokens(
            [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
        )  # 258, 259
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|im_start|>",
                "eos_token": {"content": "<|im_end|>"},
                "chat_template": template,
            }
        )
    )


@pytest.fixture
def folder_of(tmp_path):
    """A copy, for a test to spoil, of a golden model with a tokenizer: folder_of("qwen2")."""

    def make(family: str, thinking: bool = True, name: str | None = None) -> Path:
        folder = tmp_path / (name or family)
        shutil.copytree(GOLDEN / family, folder)
        (folder / "expected.safetensors").unlink()
        write_tokenizer(folder, thinking)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 261]}))
        return folder

    return make


# Vectors of one width and of twice that; without instructions for bfloat16, where there are some.
PROCESSORS = [{"__AVX512F__": wide, "__AVX512BF16__": 0} for wide in (0, 1)] + [{}]


@pytest.fixture
def as_on(monkeypatch):
    """as_on(processor): C++ is compiled as for one of PROCESSORS."""
    library = native.library

    def patch(processor):
        monkeypatch.setattr(native, "library", lambda name, **kw: library(name, **kw, **processor))

    return patch


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Unread(TorchFunctionMode):
    """No value is read: on a CPU newer versions of PyTorch read one without an operation."""

    READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in self.READS, f"{name} waits for the device"
        return func(*args, **kwargs or {})


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: a function's operations, to be repeated on the same tensors.

    As while a graph is captured, nothing is done (here: undone at the end), and what moves a value
    between host and device fails: reading one, making a tensor of one.
    """

    WAIT = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.lift_fresh.default,
    )

    def __init__(self, function):
        super().__init__()
        self.operations, self.before = [], []
        with self, Unread():
            function()
        for x, was in reversed(self.before):
            x.copy_(was)
        self.before.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func not in self.WAIT, f"{func} waits for the device"
        assert func is not torch.ops.aten.where.self or all(x.ndim for x in args), (
            "where with a number copies it to the device"
        )
        for argument, x in zip(func._schema.arguments, args):  # what it is about to overwrite
            if argument.alias_info and argument.alias_info.is_write:
                self.before.append((x, x.clone()))
        out = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for x, y in zip(*(z if isinstance(z, (tuple, list)) else (z,) for z in (out, again))):
                if isinstance(x, torch.Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


def record_steps(monkeypatch):
    """From now on models decode on a CPU as on CUDA: from recordings, and noticing ends late.

    Returns the list of replays.
    """
    replays = []

    class Replayed(Recording):
        def replay(self):
            replays.append(self)
            super().replay()

    class OnCpu(Recorder):
        def capture(self):
            return Replayed(self.step)

    monkeypatch.setattr(model.Transformer, "recorder", OnCpu)
    return replays


# ------------------------------------------------------------------------------ what tests share

NATIVE = model.choose("cpu", None)[1] == torch.bfloat16
BFLOAT16 = pytest.param(
    "bfloat16", marks=pytest.mark.skipif(not NATIVE, reason="no bfloat16 instructions")
)
DTYPES = ["float32", BFLOAT16]


def close(a, b, tolerance):
    return ((a - b).norm() / b.norm()).item() < tolerance


def edit(folder: Path, **changes):
    """Changes config.json; "DELETE" takes a value out."""
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in (config | changes).items() if v != "DELETE"}
    (folder / "config.json").write_text(json.dumps(config))


def compiled_whole(monkeypatch):
    """torch.compile traces without Inductor; -> for each graph, the operations that it calls."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs, options=None):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def whole(function, options=None):
        return compile(function, backend=backend, fullgraph=True, options=options)

    monkeypatch.setattr(torch, "compile", whole)
    return graphs
