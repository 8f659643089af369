"""One token through any number of layers, in one call of C: a `Program`.

A program is written once and run for every token: it holds pointers to weights, states and what
passes between them, and what each instruction is told. Everything that it points to stays alive as
long as it does; whoever replaces a weight writes another program.

Symbols: b vectors at once, one of each row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kizzasi.models.ops.native import library
from kizzasi.models.ops.native.packed import packed_sizes
from kizzasi.models.ops.packed import Packed

# As in step.c.
ORDER = ("product", "norm", "gate", "add", "conv", "scan", "ssd", "mix", "wkv4", "experts")
ORDER += (
    "attend",
    "packed",
    "pick",
    "delta",
    "wkv7",
    "linear",
    "rglru",
    "trapezoid",
)  # as in step.c
ACTIVATIONS = ("", "silu", "sigmoid", "relu", "relu2", "gelu", "gelu_tanh", "gelu_quick", "tanh")
MANY = 4  # rows beyond which the products of BLAS are faster
WORTH_A_THREAD = 2**20  # weights that are worth the start of a thread


def program(dtype: torch.dtype, rows: int) -> Program | None:
    """`no_program`: the rule."""
    return Program(dtype, rows) if dtype in library.REALS and rows <= MANY else None


class Program:
    """Instructions for one token of each of b rows.

    Vectors are tensors (b, n) with a last stride of 1; a result is room that is written anew for
    every token. Vectors, weights and states are of one dtype and on the CPU.

    Args:
        dtype: float32 or float64.
        rows: b.

    offers: by name, what a layer has made for later ones; by how many instructions it was there.
    """

    def __init__(self, dtype: torch.dtype, rows: int) -> None:
        self.dtype, self.rows = dtype, rows
        self.tensors: list[Tensor | None] = []
        self.codes: list[list[int]] = []
        self.starts: list[int] = []
        self.made: dict[tuple[str, int], Tensor] = {}
        self.offers: dict[str, tuple[int, Tensor]] = {}
        self.clock = torch.zeros(2, dtype=torch.int64)
        self._now = (ctypes.c_int64 * 2).from_address(self.clock.data_ptr())
        self.prepares: list[tuple[int, int, Callable[[], None]]] = []
        self.due = 0
        self._place: int | None = None
        self._scratch = torch.zeros(0, dtype=dtype)
        self._run: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self.codes)

    def cut(self, length: int) -> None:
        """Forget all instructions but the first `length`."""
        if length < len(self.codes):
            del self.tensors[self.starts[length] :]
            del self.codes[length:], self.starts[length:]
            self.prepares = [each for each in self.prepares if each[0] < length]
            self.offers = {k: one for k, one in self.offers.items() if one[0] <= length}

    def room(self, name: str, width: int) -> Tensor:
        """(b, width), the same whenever asked for by this name and width."""
        key = name, width
        if key not in self.made:
            self.made[key] = torch.zeros(self.rows, width, dtype=self.dtype)
        return self.made[key]

    def number(self, *values: float) -> Tensor:
        """Constants of an instruction, as it takes them."""
        return torch.tensor(values, dtype=torch.float64)

    def add(self, which: str, tensors: Sequence[Tensor | None], *sizes: int) -> int:
        """One more instruction; its number."""
        assert self._run is None, "a program is written before it is run"
        self.starts.append(len(self.tensors))
        self.tensors += tensors
        self.codes.append([ORDER.index(which), len(tensors), 1 + len(sizes), self.rows, *sizes])
        return len(self.codes) - 1

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        """y = W x + bias, for weight (n, k)."""
        n, k = weight.shape
        threads = min(torch.get_num_threads(), weight.numel() // WORTH_A_THREAD)
        rows = weight.stride(0), x.stride(0), y.stride(0)
        self.add("product", [x, weight, bias, y], n, k, *rows, threads)

    def packed(self, x: Tensor, weight: Packed, bias: Tensor | None, y: Tensor) -> None:
        """y = W x + bias for a weight in levels."""
        sums = self.room("sums of groups", weight.scale.shape[1])
        self.add("packed", [x, *weight, bias, y, sums], *packed_sizes(x, weight, y))

    def norm(
        self,
        x: Tensor,
        y: Tensor,
        d: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        centred: bool = False,
        plus_one: bool = False,
        each: bool = False,
    ) -> None:
        """y = (w + plus_one) (x - mean) / sqrt(var + eps) + bias over groups of d; x is centred or
        taken as it is. Every group has the weights and biases, or with `each` its own d of them."""
        groups, step = x.shape[1] // d, d if each else 0
        tensors = [x, weight, bias, self.number(eps), y]
        sizes = d, groups, step, x.stride(0), y.stride(0), int(centred), int(plus_one)
        self.add("norm", tensors, *sizes)

    def gate(self, kind: str, a: Tensor, c: Tensor | None, y: Tensor) -> None:
        """y = activation(a) c."""
        c_row = 0 if c is None else c.stride(0)
        rows = a.stride(0), c_row, y.stride(0)
        self.add("gate", [a, c, y], a.shape[1], ACTIVATIONS.index(kind), *rows)

    def join(self, x: Tensor, y: Tensor, stream: float = 1, by: float = 1) -> None:
        """x = stream x + by y."""
        self.add("add", [x, y, self.number(stream, by)], x.shape[1])

    def offer(self, name: str, y: Tensor) -> None:
        """What the instructions so far have made of y is there for all that follow."""
        self.offers.setdefault(name, (len(self.codes), y))

    def pick(self, x: Tensor, index: Tensor, y: Tensor) -> None:
        """y[:, j] = x[:, index[j]], for an int64 index."""
        self.add("pick", [x, index, y], len(index), x.stride(0), y.stride(0))

    @property
    def place(self) -> int:
        """Of the next token, where instructions depend on it."""
        return self._now[0]

    def starts_at(self, place: int) -> bool:
        """Whether the first token will be at this place: the first who asks decides."""
        if self._place is None:
            self._place = self._now[0] = place
        return self._place == place

    def every(self, tokens: int, prepare: Callable[[], None]) -> None:
        """Call `prepare` before the first token, and after so many, for the instruction before."""
        self.prepares.append((len(self.codes) - 1, tokens, prepare))

    def attend(
        self, heads: Tensor, y: Tensor, shape: tuple[int, int, int], turned: int, *stencil: int
    ) -> Callable[[Tensor, Sequence[Tensor]], None]:
        """Turn queries and keys, store keys and values, and attend to all that is stored.

        Args:
            heads: (b, (h + 2 h_kv) d), queries, keys, values.
            y: (b, h d).
            shape: h, h_kv, d.
            turned: entries of a head that rotate; 0 for none.
            stencil: window, 0 for none, and how many first positions are seen besides.

        Returns:
            move(store, tables), to be called before the first token and whenever they are others:
            the store (b, 2 h_kv, room, d), and cosines and sines (places, turned) from the next
            token's place on, none of them without turns.
        """
        sizes = *shape, turned, 0, *stencil, torch.get_num_threads()
        at = self.add("attend", [heads, None, None, None, self.clock, None, y], *sizes)

        def move(store: Tensor, tables: Sequence[Tensor]) -> None:
            self._now[1] = self._now[0]
            room = store.shape[2]
            if len(self._scratch) < self.rows * shape[0] * room:
                self._scratch = torch.zeros(self.rows * shape[0] * room, dtype=self.dtype)
            moved = {**dict(enumerate(tables, 1)), 3: store, 5: self._scratch}
            for pointer, tensor in moved.items():
                self._point(self.starts[at] + pointer, tensor)
            self._sizes[self._places[at] + 8] = room

        return move

    def run(self) -> None:
        """All instructions, in their order."""
        if self._run is None:
            self._run = self._close()
        if self.prepares and self._now[0] >= self.due:
            for _, tokens, prepare in self.prepares:
                self.due = self._now[0] + tokens
                prepare()
        self._run()
        self._now[0] += 1

    def _point(self, at: int, tensor: Tensor) -> None:
        self.tensors[at], self._pointers[at] = tensor, tensor.data_ptr()

    def _close(self) -> Callable[[], None]:
        pointers = [None if x is None else x.data_ptr() for x in self.tensors]
        flat, self._places = [len(self.codes)], []
        for code in self.codes:
            self._places.append(len(flat))
            flat += code
        self._pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self._sizes = (ctypes.c_int64 * len(flat))(*flat)
        kernel = library.kernel("steps", self.dtype)
        p, s = ctypes.byref(self._pointers), ctypes.byref(self._sizes)
        return lambda: kernel(p, s)
