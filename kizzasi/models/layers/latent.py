"""Free Transformer: a stack that reads a few random bits of every token, which say what will come.

    x       the stream that enters
    H       bits of a token, n_bits
    l       logits of the bits, (b, t, H);  p = sigmoid(l)
    B       the bits, 0 or 1
    kappa   bits of a token that cost nothing in training, free_bits

    l = W_read norm(encoder(x))      the encoder's layers see the whole document
        or encoder(zeta; x)          "learned": one vector everywhere, which looks at x
    B ~ p in training, else B ~ 1/2
    r = W_post (2 B - 1)             "factored";  or  r = W_post onehot(B)      "table", 2^H rows
    y = body(x with r)

    KL[t] = sum_h (ln 2 - entropy of B_h);   loss = mean_t max(0, KL[t] - kappa ln 2)

    add     the body reads x + r
    film    the body reads (1 + s) x + a,     s, a = W_film r
    lora    the body reads x + W_up (W_mid r * W_down x)
    kv      the body reads x; keys and values of its first layer are made of x + r

film and lora may also turn what the norms of the first layer give, its queries or its values, as a
`condition` does; see `parts.turns`.

What the bits change starts at zero, so that the layer starts as its body.

In training, and where a model scores (`model(inputs, coded=True)`), the encoder runs and its bits
are charged; elsewhere bits are drawn from the prior, as functions of the state's key and of the
position, and the encoder does not run: no output then depends on later tokens.

Source: Fleuret 2025, arXiv:2510.17558, sections 3 and 4.
Differs: the paper's are query "learned", inject "kv", form "table" and an encoder of one layer
(`presets.free_transformer`); add is that of the first part of its section 3, film and lora are
EvoForge's. The bits of a prompt are drawn from the prior too, where the paper encodes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kizzasi.models import init
from kizzasi.models.call import Call
from kizzasi.models.cost import Cost, dense, linear, norm
from kizzasi.models.layers.layer import (
    LayerModule,
    LayerSpec,
    cost_of,
    depth_of,
    settle_stack,
    window_of,
)
from kizzasi.models.layers.stack import Stack
from kizzasi.models.mixer import CHARGE, LayerContext, MixerOut, add_losses
from kizzasi.models.norm import Norm, WideLinear
from kizzasi.models.ops.noise import uniform_of
from kizzasi.models.parts.turns import Tap, Turn, Turns, beside, chained, grouped
from kizzasi.models.state import ModelState
from kizzasi.strict import added, join, register, require

MOST_IN_A_TABLE = 8
LN2 = math.log(2)


@register
@dataclass(frozen=True)
class LatentSpec(LayerSpec):
    """A body that reads latent bits.

    Args:
        body: the layers that read the bits.
        encoder: the layers that choose them; they may see the whole document.
        query: what the encoder's stream begins as: "stream", x; "learned", one vector, while the
            keys and values of its first layer are made of x.
        n_bits: H; at most 8 for a table.
        free_bits: kappa, in bits.
        inject: how the body reads them; see above.
        rank: of "lora".
        film_at, lora_at: what they change: "stream", what the body reads, or of its first layer
            "norm", "q" or "v".
        form: "factored" or "table".
        seed: of the bits drawn from the prior.
    """

    kind: ClassVar[str] = "latent"
    body: tuple[LayerSpec, ...]
    encoder: tuple[LayerSpec, ...]
    n_bits: int = 16
    free_bits: float = 0.5
    inject: tuple[Literal["add", "film", "lora", "kv"], ...] = ("add",)
    rank: int | None = None
    form: Literal["factored", "table"] = "factored"
    seed: int = 0
    query: Literal["stream", "learned"] = added("stream")
    film_at: Literal["stream", "norm", "q", "v"] = added("stream")
    lora_at: Literal["stream", "norm", "q", "v"] = added("stream")

    def check(self, d_model: int, path: str) -> None:
        super().check(d_model, path)
        self.require_positive(path, "n_bits")
        rule = f"{self.n_bits} bits make 2^{self.n_bits} rows; give at most 8, or form 'factored'"
        small = self.form == "factored" or self.n_bits <= MOST_IN_A_TABLE
        require(small, join(path, "n_bits"), rule)
        rule = f"{self.free_bits} is negative; give 0 or more"
        require(self.free_bits >= 0, join(path, "free_bits"), rule)
        rule = f"{self.inject} must name some of add, film, lora and kv, each once"
        once = len(self.inject) > 0 and len(set(self.inject)) == len(self.inject)
        require(once, join(path, "inject"), rule)
        rule = "what is added reaches keys and values too; leave out 'add' or 'kv'"
        require(not {"add", "kv"} <= {*self.inject}, join(path, "inject"), rule)
        self._check_crossing(path)
        lora = "lora" in self.inject
        rule = f"{self.inject} {'needs a rank' if lora else 'takes no rank'}"
        require((self.rank is not None) == lora, join(path, "rank"), rule)
        if self.rank is not None:
            self.require_positive(path, "rank")
        self._check_turning(d_model, path)
        require(self.causal, join(path, "body"), "it reads later tokens; only the encoder may")

    def _check_turning(self, d_model: int, path: str) -> None:
        """Raise SpecError where bits are to turn what the first layer does not have."""
        for op in ("film", "lora"):
            at, where = getattr(self, f"{op}_at"), join(path, f"{op}_at")
            named = op in self.inject or at == "stream"
            require(named, where, f"{op!r} is not among inject; leave it out")
            rule = f"the first layer has no {at!r}; give a block of attention, or 'stream'"
            require(at == "stream" or at in self.body[0].taps(d_model), where, rule)

    def tap(self, op: str, d_model: int) -> Tap:
        """What an op changes."""
        at = getattr(self, f"{op}_at")
        return Tap(d_model, d_model, 1) if at == "stream" else self.body[0].taps(d_model)[at]

    def _check_crossing(self, path: str) -> None:
        """Raise SpecError where a layer is to look at another stream and cannot."""
        rule = "its keys and values are made of another stream; begin with a block of attention"
        rule += ", without kv_from, memory_from, qkv_rank and value_glu, or give "
        body, encoder = join(path, "body[0]"), join(path, "encoder[0]")
        rules = f"{rule}inject 'add'", f"{rule}query 'stream'"
        require("kv" not in self.inject or self.body[0].crosses, body, rules[0])
        require(self.query == "stream" or self.encoder[0].crosses, encoder, rules[1])

    def settle(self, offered: bool, path: str = "") -> tuple[LatentSpec, bool]:
        """The encoder stands alone: it does not always run."""
        encoder, _ = settle_stack(self.encoder, False, join(path, "encoder"))
        body, offered = settle_stack(self.body, offered, join(path, "body"))
        return replace(self, body=body, encoder=encoder), offered

    def build(self, context: LayerContext, eps: float, dropout: float) -> Latent:
        return Latent(self, context, eps, dropout)

    def cost(self, context: LayerContext, seq_len: int, batch: int) -> Cost:
        """Of a call that draws from the prior: parameters of the encoder, but not its work."""
        d, n = context.d_model, seq_len * batch
        encoder = cost_of(self.encoder, context, seq_len, batch)
        total = cost_of(self.body, context, seq_len, batch)
        total += Cost(encoder.params, encoder.active_params, 0, 16 * batch)
        total += norm("rms", d) + dense((d + 1) * self.n_bits)
        total += dense(d if self.query == "learned" else 0)
        total += linear(n, self.width, d)
        if "film" in self.inject:
            total += linear(n, d, 2 * self.tap("film", d).width)
        if self.rank is not None:
            tap = self.tap("lora", d)
            low = linear(n, tap.n_in, self.rank) + linear(n, self.rank, tap.width)
            total += linear(n, d, self.rank) + low._replace(flops=tap.times * low.flops)
        return total

    def coding_flops(self, context: LayerContext, seq_len: int, batch: int) -> int:
        encoder = cost_of(self.encoder, context, seq_len, batch)
        return encoder.flops + linear(seq_len * batch, context.d_model, self.n_bits).flops

    @property
    def width(self) -> int:
        """Entries of what W_post reads."""
        return self.n_bits if self.form == "factored" else 2**self.n_bits

    @property
    def depth(self) -> int:
        return depth_of(self.body)

    @property
    def context_window(self) -> float:
        return window_of(self.body)

    @property
    def causal(self) -> bool:
        """Of a call that draws from the prior."""
        return all(layer.causal for layer in self.body)

    @property
    def encodes(self) -> bool:
        return True


class LatentState(NamedTuple):
    """body: a state per layer. position (b,) int64: place of the next token in its document. key
    (b,) int64: with the seed, what the bits drawn from the prior are a function of; 0 at first."""

    body: tuple[Any, ...]
    position: Tensor
    key: Tensor


def with_latent_key(state: ModelState, key: Tensor | int) -> ModelState:
    """The state whose latent bits to come are drawn with another key: other bits, other texts.

    Args:
        state: of a model with `latent` layers.
        key: (b,) integers, or one for all rows.
    """

    def exchanged(block: Any) -> Any:
        if not isinstance(block, LatentState):
            return block
        return block._replace(key=torch.as_tensor(key).to(block.key).expand_as(block.key).clone())

    return state._replace(blocks=tuple(exchanged(block) for block in state.blocks))


class Latent(LayerModule):
    """See `LatentSpec`."""

    def __init__(self, spec: LatentSpec, context: LayerContext, eps: float, dropout: float) -> None:
        super().__init__()
        d, self.spec = context.d_model, spec
        self.body = Stack.of(spec.body, context, eps, dropout)
        self.encoder = Stack.of(spec.encoder, context, eps, dropout)
        self.query = nn.Parameter(torch.empty(d)) if spec.query == "learned" else None
        self.norm = Norm("rms", d, eps)
        self.read = WideLinear(d, spec.n_bits)
        self.post = nn.Linear(spec.width, d, bias=False)
        self.film = None
        if "film" in spec.inject:
            self.film = nn.Linear(d, 2 * spec.tap("film", d).width, bias=False)
        self.down = self.mid = self.up = None
        if spec.rank is not None:
            tap = spec.tap("lora", d)
            self.down = nn.Linear(tap.n_in, spec.rank, bias=False)
            self.mid = nn.Linear(d, spec.rank, bias=False)
            self.up = nn.Linear(spec.rank, tap.width, bias=False)

    def reset_parameters(self, n_layers: int, generator: torch.Generator | None = None) -> None:
        for stack in (self.body, self.encoder):
            stack.reset_parameters(n_layers, generator)
        self.norm.reset_parameters()
        init.linear_(self.read, generator)
        init.linear_(self.post, generator)
        if not {"add", "kv"}.isdisjoint(self.spec.inject):
            nn.init.zeros_(self.post.weight)
        if self.query is not None:
            nn.init.normal_(self.query, std=0.02, generator=generator)
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
        if self.down is not None and self.mid is not None and self.up is not None:
            init.linear_(self.down, generator)
            init.linear_(self.mid, generator)
            nn.init.zeros_(self.up.weight)

    def parallel(self, x: Tensor, state: LatentState | None, call: Call) -> MixerOut:
        zeros = x.new_zeros(len(x), dtype=torch.int64)
        start, key = (zeros, zeros) if state is None else (state.position, state.key)
        position = call.places(start)[1].expand(len(x), -1)
        if call.real is not None:
            position = position.masked_fill(~call.real, -1)
        aux: dict[str, Tensor] = {}
        if call.coded or (self.training and not call.step):
            read, aux = self._encoded(x, position, key, call)
        else:
            bits = (self._chance(position, key) < 0.5).to(x.dtype)
            read = self._read_by_body(bits[:, 0] if call.step else bits, None)
        before = None if state is None else state.body
        r = self.post(read)
        y, turns = self._injected(x, r)
        memory = y + r if "kv" in self.spec.inject else None
        ran = self.body(y, before, call, memory=memory, turns=(turns,))
        after = LatentState(ran.state, position[:, -1] + 1, key)
        return MixerOut(ran.x, after, add_losses(aux, ran.aux), ran.shared)

    def init_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> LatentState:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return LatentState(self.body.init_state(batch, device, dtype), zeros, zeros)

    def _encoded(
        self, x: Tensor, position: Tensor, key: Tensor, call: Call
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What W_post reads, and what it costs: a loss in training, nats of every token in a score.

        Training draws from torch's generator; a score from the position, so that it is one number.
        """
        if self.query is None:
            ran = self.encoder(x, None, call.alone())
        else:
            begun = torch.zeros_like(x) + self.query.to(x.dtype)
            ran = self.encoder(begun, None, call.alone(), memory=x)
        logits = self.read(self.norm(ran.x))
        p = logits.sigmoid()
        chance = torch.rand_like(p) if self.training else self._chance(position, key).to(p)
        bits = (chance < p).to(p.dtype)
        entropy = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits))
        kl = (LN2 - entropy).sum(-1)
        read = self._read_by_body(bits, p).to(x.dtype)
        if not self.training:
            return read, {CHARGE: kl}
        over = (kl - self.spec.free_bits * LN2).clamp(min=0)
        if call.real is None:
            return read, {**ran.aux, "latent": over.mean()}
        mean = torch.where(call.real, over, 0.0).sum() / call.real.sum().clamp(min=1)
        return read, {**ran.aux, "latent": mean}

    def _chance(self, position: Tensor, key: Tensor) -> Tensor:
        """(b, t, H) numbers in (0, 1), functions of seed, key and position."""
        return uniform_of(self.spec.seed, position.clamp(min=0), self.spec.n_bits, key)

    def _read_by_body(self, bits: Tensor, p: Tensor | None) -> Tensor:
        """What W_post reads: of the bits, with the gradient of their probabilities p."""
        if self.spec.form == "factored":
            return 2 * (bits if p is None else bits + (p - p.detach())) - 1
        hard = _joint(bits)
        soft = None if p is None else _joint(p)
        return hard if soft is None else hard + (soft - soft.detach())

    def _injected(self, x: Tensor, r: Tensor) -> tuple[Tensor, Turns]:
        """What the body reads, and what turns its first layer."""
        ops: list[tuple[str, Turn]] = []
        if self.film is not None:
            both = self.film(r)
            ops.append((self.spec.film_at, lambda z, _: grouped(z, both, "film", z.shape[-1])))
        if self.down is not None and self.mid is not None and self.up is not None:
            down, up, middle = self.down, self.up, self.mid(r)
            ops.append((self.spec.lora_at, lambda z, x: z + up(beside(x, middle) * down(x))))
        y, turns = x, {}
        for at, op in ops:
            if at == "stream":
                y = op(y, x)
            else:  # what stands there already acts first
                turns[at] = op if at not in turns else chained(turns[at], op)
        return (y + r if "add" in self.spec.inject else y), turns


def _joint(p: Tensor) -> Tensor:
    """(..., 2^H) probabilities of all patterns of H independent bits (..., H)."""
    joint = torch.ones_like(p[..., :1])
    for bit in p.split(1, -1):
        joint = torch.cat([joint * (1 - bit), joint * bit], -1)
    return joint
