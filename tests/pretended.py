"""A GPU that is not there: its tensors say that they are on it, their numbers are on the CPU.

    python tests/pretended.py soft_thinking.py --device cuda
    python tests/pretended.py -m pytest tests/test_cuda.py -k "recorded_steps and not cpu"

A CPU lets pass what a GPU does not: a tensor of the one in an operation of the other; while steps
are recorded, values that are read or moved. Here that raises, too, and graphs are replayed. There
are no gradients, no compiler and no TF32; kernels are PyTorch's, and memory never falls short.
"""

import ctypes
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten, GPU = torch.ops.aten, torch.device("cuda", 0)
MOVES = aten._to_copy.default, aten.copy_.default
READS = aten._local_scalar_dense, aten.nonzero, aten.equal, aten.allclose, aten.masked_select
READS += aten.bincount, aten._unique2, aten.unique_dim, aten.unique_consecutive
READS += (aten.repeat_interleave,)
INDEXES = aten.index.Tensor, aten.index_put_.default, aten.index_put.default
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &guard);
"""


class Pretended(Tensor):
    numbers: Tensor  # on the CPU

    @staticmethod
    def __new__(cls, x: Tensor) -> "Pretended":  # noqa: PYI034 (Python 3.11 has Self)
        kinds = {"dtype": x.dtype, "layout": x.layout, "device": GPU}
        places = {"strides": x.stride(), "storage_offset": x.storage_offset()}
        y = Tensor._make_wrapper_subclass(cls, x.shape, **places, **kinds)
        y.numbers = x
        return y

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()


class Everywhere(TorchDispatchMode):
    """Operations that make tensors, too, which no argument tells to be the GPU's."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Graph:
    """What is run while it is recorded is undone, and done when it is replayed."""

    now: "Graph | None" = None  # the one that is being recorded

    def __init__(self):
        self.operations, self.before = [], []

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


class Recording:  # torch.cuda.graph
    def __init__(self, graph: Graph, pool: None = None):
        self.graph = graph

    def __enter__(self):
        Graph.now = self.graph

    def __exit__(self, *_):
        Graph.now = None
        for x, was in reversed(self.graph.before):
            x.copy_(was)
        self.graph.before.clear()


class Event:
    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def on_gpu(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def run(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Pretended)]
    named = {a.name: x for a, x in zip(func._schema.arguments, args)} | kwargs
    written = [a.name for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    written = [named[name] for name in written if isinstance(named.get(name), Tensor)]
    if ours and func not in MOVES:
        check_devices(func, args, tensors, written)
    if Graph.now:
        check_waits(func, args, kwargs, tensors)
    device = kwargs.get("device")
    here = on_gpu(device) or (device is None and bool(ours))
    if func is aten.copy_.default:
        here = isinstance(args[0], Pretended)
    inner = {k: x for k, x in kwargs.items() if k not in ("pin_memory", "non_blocking")}
    inner = tree_map(numbers, (args, inner))
    if Graph.now and here:
        Graph.now.before += [(numbers(x), numbers(x).clone()) for x in written]
    out = func(*inner[0], **inner[1])
    if not here:
        return out
    if Graph.now:
        Graph.now.operations.append((func, *inner, out))
    same = {id(x.numbers): x for x in ours}  # an operation in place yields its argument
    return tree_map(lambda x: same.get(id(x), Pretended(x)) if isinstance(x, Tensor) else x, out)


def check_devices(func, args, tensors, written) -> None:
    """RuntimeError where a tensor is not on the GPU, and PyTorch does not bring it there."""
    brought = tree_leaves(args[1]) if func in INDEXES else []  # indices
    fills = *INDEXES[1:], aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor
    if torch.Tag.pointwise in func.tags or func in fills:  # a number that is a tensor
        brought += [x for x in tensors if not x.ndim and not any(x is y for y in written)]
    for x in tensors:
        if not isinstance(x, Pretended) and not any(x is y for y in brought):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")


def check_waits(func, args, kwargs, tensors) -> None:
    """RuntimeError for what waits for the GPU, or for the host's memory."""
    devices = {x.device.type for x in tensors}
    if "device" in kwargs:
        devices.add(torch.device(kwargs["device"]).type)
    waits = func in MOVES and len(devices) > 1
    if func in INDEXES:
        waits = any(
            x is not None and (x.dtype == torch.bool or not isinstance(x, Pretended))
            for x in args[1]
        )
    if func is aten.where.self:  # elsewhere a number goes along with the operation
        waits = not all(isinstance(x, Pretended) for x in tensors)
    if waits or func.overloadpacket in READS:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


def numbers(x):
    if isinstance(x, torch.device) and on_gpu(x):
        return torch.device("cpu")
    return x.numbers if isinstance(x, Pretended) else x


def load_guard() -> None:
    """Without CUDA PyTorch has nothing that says which GPU is the current one."""
    from lab import native

    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = [*native.compiler(), "-std=c++20", "-shared", "-fPIC"]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
        command += [str(source), "-o", str(made), f"-I{torch_folder / 'include'}"]
        subprocess.run([*command, f"-L{torch_folder / 'lib'}", "-lc10"], check=True)
        ctypes.CDLL(str(made))


def start() -> None:
    """From now on this process has a GPU."""
    # Such tensors cannot be made in inference mode, which model.py's functions are put in.
    torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)
    load_guard()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device="cuda") moves one

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu")

    torch.Generator = Generator
    free = 8 << 30
    facts = {"is_available": True, "device_count": 1, "current_device": 0, "set_device": None}
    facts |= {"mem_get_info": (free, free), "memory_allocated": 0, "memory_reserved": 0}
    facts |= {"max_memory_allocated": 0, "reset_peak_memory_stats": None, "synchronize": None}
    facts |= {"_lazy_init": None, "get_device_name": "a GPU that is not there"}
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    # Which kernel is the right one would be asked of the GPU.
    F.scaled_dot_product_attention = lambda q, k, v, attn_mask=None, **how: (
        aten._scaled_dot_product_attention_math(q, k, v, attn_mask, **how)[0]
    )
    torch.cuda.CUDAGraph, torch.cuda.graph, torch.cuda.Event = Graph, Recording, Event
    Everywhere().__enter__()
    from model import masked_attention

    def attend(q, k, v, positions, mask):  # what is behind a row is not read: it may be NaN
        return masked_attention(q, k.nan_to_num(), v.nan_to_num(), positions, mask)

    kernels = ModuleType("lab.kernels")  # Triton's read addresses
    kernels.attend = attend
    kernels.int8_linear = lambda x, W, scale, bias: F.linear(x, W * scale[:, None], bias)
    kernels.check_products = lambda layers: None
    sys.modules["lab.kernels"] = kernels


if __name__ == "__main__":
    sys.argv, sys.path[0] = sys.argv[1:], str(Path(__file__).parent.parent)
    start()
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
