"""Faster steps for model.decode: compiled by Inductor, with our own kernels, or recorded once."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from model import KVCache, Transformer, UserError, masked_attention


class CompiledStep:
    """Transformer.step compiled by Inductor, for CUDA: what stands between products is fused.

    It is compiled for each number of rows, and for all lengths.
    """

    def __init__(self, model: Transformer):
        self.model, self.sizes = model, set()  # sizes: numbers of rows that it has had
        self.one: Callable | None = None

    def __getstate__(self) -> dict:  # a copy compiles for itself
        return self.__dict__ | {"one": None, "sizes": set()}

    def prepare(self) -> None:
        """Have `plain` compiled when it is called.

        Before each step Dynamo would ask of every module of the model whether it has changed. These
        guards are skipped: a module that is changed later goes unnoticed. Dynamo finds what it has
        compiled by a function's code; without the guards it would take one model's step for
        another's, so that each has a copy of the code.
        """
        skip = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)
        options = {"size_asserts": False}  # each would be a call from Python
        options |= {"guard_filter_fn": skip} if skip else {}  # not in every torch
        own = FunctionType(CompiledStep.plain.__code__.replace(), globals())
        self.one = torch.compile(MethodType(own, self), options=options)

    def plain(self, x: Tensor, rotation: tuple, cache: KVCache) -> tuple[Tensor, Tensor]:
        for layer, block in enumerate(self.model.layers):
            x = block(x, rotation, layer, cache)
        hidden = self.model.norm(x)[:, 0]
        return hidden, self.model.logits(hidden)

    def __call__(self, embeds: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        x, rotation, B = embeds[:, None], self.model.rotation(cache.advance(1)), len(embeds)
        if B in self.sizes:
            return self.one(x, rotation, cache)
        if not self.one:
            self.prepare()
        # All lengths and capacities.
        for tensor, dim in [(cache.mask, 3), *((y, 2) for y in cache.keys + cache.values)]:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)
        stats = torch._dynamo.utils.counters["stats"]
        start, done = time.perf_counter(), stats["unique_graphs"]
        try:
            # Else torch 2.6 makes a tensor of an eps that is not another model's, and gives up.
            with torch._dynamo.config.patch(specialize_float=True):
                out = self.one(x, rotation, cache)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (of the compiler, of its cache, of the system)
            cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise UserError(f"compiling failed ({cause}): leave --compile out") from None
        self.sizes.add(B)
        took = time.perf_counter() - start
        if stats["unique_graphs"] > done:
            print(f"compiled the step for {B} sequences in {took:.0f} s", file=sys.stderr)
        return out


def use_kernels(model: Transformer, layers: list[nn.Module]) -> None:
    """Decode with lab/kernels.py, if it computes what PyTorch does; else a line says why not.

    layers: those with weights in 8 bits.
    """
    try:
        from lab import kernels  # here: not every system has Triton

        check_attention(kernels.attend, model)
        kernels.check_products(layers)
    except Exception as error:  # noqa: BLE001 (of Triton, of its compiler, of the driver)
        refuse("Triton's kernels cannot be used here", error)
        return
    model.attention = kernels.attend
    for layer in layers:
        layer.product = kernels.int8_linear


def refuse(what: str, error: Exception) -> None:
    cause = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"{what}, PyTorch's are used ({cause})", file=sys.stderr)


@torch.inference_mode()
def check_attention(attend: Callable, model: Transformer) -> None:
    """ArithmeticError where a kernel and PyTorch differ by more than rounding.

    On random numbers of the model's shapes, for one query per row: rows that end in their first
    chunk of 256 positions, in the second, and with the third; what is behind is NaN.
    """
    c, E = model.config, model.embed.weight
    generator = torch.Generator(E.device).manual_seed(0)
    place = torch.arange(800, device=E.device)
    shapes = (3, 1, c.heads, c.head_dim), *2 * [(3, c.kv_heads, 800, c.head_dim)]
    q, keys, values = (
        torch.randn(shape, generator=generator, device=E.device).to(E.dtype) for shape in shapes
    )
    last = torch.tensor([0, 256, 767], device=E.device)[:, None]
    later = place[:768] > last.repeat(1, c.heads // c.kv_heads)[:, None, :, None]
    mask = torch.zeros(later.shape, device=E.device).masked_fill(later, -math.inf)
    exact = masked_attention(*(x.float() for x in (q, keys, values)), last, mask)
    for x in (keys, values):
        x.masked_fill_((place > last)[:, None, :, None], math.nan)
    compare("attention", attend(q, keys, values, last, mask.to(E.dtype)), exact)


def compare(what: str, found: Tensor, exact: Tensor) -> None:
    most = max(4 * torch.finfo(found.dtype).eps, 1e-4)
    error, size = (found - exact).norm(dim=-1), exact.norm(dim=-1)
    off = max(error.norm() / size.norm(), (error / size).max() / 4)  # a row may be off by more
    if not off <= most:  # NaN too
        raise ArithmeticError(f"{what} in {str(found.dtype)[6:]} is off by {off:.2g}")


class Recorder:
    """decode's step as a CUDA graph, one for each S, and its ends, noticed one step late.

    Launching a step's kernels one by one takes the host longer than running them takes the GPU,
    which works on while the host looks at the ends of the step before.
    """

    late = 1

    def __init__(self, model: Transformer, step: Callable, cache: KVCache, live: Tensor):
        self.model, self.step, self.cache, self.live = model, step, cache, live
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.capacity, self.refused = 0, False
        self.pending = deque([Flags(torch.ones_like(live))] * self.late)

    def __call__(self) -> list[bool]:
        """One step; which rows were live `late` steps ago."""
        S, capacity = self.cache.S, self.cache.keys[0].shape[2]
        if capacity != self.capacity:  # the cache has moved, and recordings go by addresses
            self.capacity, self.graphs = capacity, {}
        if S in self.graphs:
            self.graphs[S].replay()
        else:
            self.step()  # this step, done at once; the recording is for those to come
            if not self.refused:
                self.record(S)
        self.pending.append(Flags(self.live))
        return self.pending.popleft().list()

    def record(self, S: int) -> None:
        try:
            self.graphs[S] = self.capture()
        except RuntimeError as error:  # a driver or an operation that cannot
            self.refused, reason = True, str(error).splitlines()[0]
            print(f"steps cannot be recorded here, and run one by one ({reason})", file=sys.stderr)

    def capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.graphs.values())).pool() if self.graphs else None
        with torch.cuda.graph(graph, pool=pool):
            self.step()
        return graph


class Flags:
    """A copy of a bool tensor on its way to the host; nobody waits before `list` is asked for."""

    def __init__(self, x: Tensor):
        # From a GPU to pinned memory, which non_blocking makes `to` allocate: pageable would wait.
        self.host = x.to("cpu", non_blocking=True, copy=True)
        self.event = torch.cuda.Event() if x.is_cuda else None
        if self.event:
            self.event.record()

    def list(self) -> list[bool]:
        if self.event:
            self.event.synchronize()
        return self.host.tolist()
