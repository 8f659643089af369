"""Published architectures as specs, and the same shapes at any size.

`presets.mamba_130m()` and its like have the published number of parameters (asserted by tests).
`presets.at_size("mamba", 200_000, vocab_size=256)` keeps a family's proportions and chooses the
width that comes nearest to a parameter budget: the unsearched architecture that a search must beat.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from kizzasi.errors import SpecError
from kizzasi.models.channels import MLPSpec, RWKVChannelSpec, SwiGLUSpec
from kizzasi.models.channels.moe import MoESpec
from kizzasi.models.layers.latent import LatentSpec
from kizzasi.models.mixer import MixerSpec
from kizzasi.models.mixers import (
    AttentionSpec,
    GatedDeltaSpec,
    Mamba2Spec,
    MambaSpec,
    RetentionSpec,
    RoutedSpec,
    RWKV4Spec,
    RWKV6Spec,
    RWKV7Spec,
    S4DSpec,
)
from kizzasi.models.spec import BlockSpec, ModelSpec, pattern
from kizzasi.models.stems import Tokens
from kizzasi.strict import require, unknown_name


def mamba(d_model: int, n_layers: int, vocab_size: int = 50280) -> ModelSpec:
    """Mamba-1 as published: d_state 16, expand 2, no channel mixer, tied head.

    Source: Gu & Dao 2023, arXiv:2312.00752, table 12; vocabulary padded to a multiple of 8.
    """
    block = BlockSpec(MambaSpec())
    return ModelSpec(d_model, (block,) * n_layers, Tokens(vocab_size), tie_head=True)


def mamba_130m() -> ModelSpec:
    return mamba(768, 24)


def mamba_370m() -> ModelSpec:
    return mamba(1024, 48)


def mamba_790m() -> ModelSpec:
    return mamba(1536, 48)


def mamba_1_4b() -> ModelSpec:
    return mamba(2048, 48)


def mamba_2_8b() -> ModelSpec:
    return mamba(2560, 64)


def falcon_mamba_7b() -> ModelSpec:
    """FalconMamba-7B: Mamba-1 with normalised step sizes, B and C, and a head of its own.

    Source: Zuo et al. 2024, arXiv:2410.05355.
    """
    spec = mamba(4096, 64, 65024).replace(tie_head=False)
    return spec.replace(blocks=(BlockSpec(MambaSpec(inner_norm="weightless")),) * 64)


def mamba2(d_model: int, n_layers: int, vocab_size: int = 50288) -> ModelSpec:
    """Mamba-2 as published: d_state 128, heads of 64, one group, no channel mixer, tied head.

    Source: Dao & Gu 2024, arXiv:2405.21060; vocabulary padded to a multiple of 16.
    """
    block = BlockSpec(Mamba2Spec())
    return ModelSpec(d_model, (block,) * n_layers, Tokens(vocab_size), tie_head=True)


def mamba2_130m() -> ModelSpec:
    return mamba2(768, 24)


def mamba2_370m() -> ModelSpec:
    return mamba2(1024, 48)


def mamba2_780m() -> ModelSpec:
    return mamba2(1536, 48)


def mamba2_1_3b() -> ModelSpec:
    return mamba2(2048, 48)


def mamba2_2_7b() -> ModelSpec:
    return mamba2(2560, 64)


def rwkv4(d_model: int, n_layers: int, vocab_size: int = 50277) -> ModelSpec:
    """RWKV-4 "Dove": channel mix of 4 d_model, LayerNorms, embeddings normalised.

    Source: Peng et al. 2023, arXiv:2305.13048.
    """
    blocks = (BlockSpec(RWKV4Spec(), RWKVChannelSpec(version=4), norm="layer"),) * n_layers
    return ModelSpec(d_model, blocks, Tokens(vocab_size), norm="layer", embed_norm=True)


def rwkv4_169m() -> ModelSpec:
    return rwkv4(768, 12)


def rwkv4_430m() -> ModelSpec:
    return rwkv4(1024, 24)


def rwkv4_1_5b() -> ModelSpec:
    return rwkv4(2048, 24)


def rwkv4_3b() -> ModelSpec:
    return rwkv4(2560, 32)


def rwkv4_7b() -> ModelSpec:
    return rwkv4(4096, 32)


def rwkv4_14b() -> ModelSpec:
    return rwkv4(5120, 40)


def rwkv6(d_model: int, n_layers: int, vocab_size: int = 65536) -> ModelSpec:
    """RWKV-6 "Finch": heads of 64, channel mix of 7/2 d_model, a multiple of 32.

    Source: Peng et al. 2024, arXiv:2404.05892.
    """
    channel = RWKVChannelSpec(hidden=7 * d_model // 64 * 32, version=6)
    blocks = (BlockSpec(RWKV6Spec(), channel, norm="layer"),) * n_layers
    return ModelSpec(d_model, blocks, Tokens(vocab_size), norm="layer", embed_norm=True)


def rwkv6_1_6b() -> ModelSpec:
    return rwkv6(2048, 24)


def rwkv7(
    d_model: int,
    n_layers: int,
    vocab_size: int = 65536,
    head_dim: int = 64,
    ranks: tuple[int, int, int, int] | None = None,
) -> ModelSpec:
    """RWKV-7 "Goose": heads of 64, channel mix of 4 d_model, LayerNorms, embeddings normalised.

    `ranks` are those of decay, in-context rate, value and gate; None leaves the mixer's own rule.

    Source: Peng et al. 2025, arXiv:2503.14456, table 2.
    """
    decay, a, v, gate = ranks or (None,) * 4
    mixer = RWKV7Spec(head_dim=head_dim, decay_rank=decay, a_rank=a, v_rank=v, gate_rank=gate)
    blocks = (BlockSpec(mixer, RWKVChannelSpec(), norm="layer"),) * n_layers
    return ModelSpec(d_model, blocks, Tokens(vocab_size), norm="layer", embed_norm=True)


def rwkv7_191m() -> ModelSpec:
    return rwkv7(768, 12, ranks=(64, 64, 32, 128))


def rwkv7_450m() -> ModelSpec:
    return rwkv7(1024, 24, ranks=(64, 64, 32, 128))


def rwkv7_1_5b() -> ModelSpec:
    return rwkv7(2048, 24, ranks=(96, 96, 64, 256))


def rwkv7_2_9b() -> ModelSpec:
    return rwkv7(2560, 32, ranks=(96, 96, 64, 320))


def llama(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden: int,
    vocab_size: int,
    *,
    rope_theta: float = 10000.0,
    tie_head: bool = False,
) -> ModelSpec:
    """A Llama-style Transformer: RoPE, grouped-query attention, SwiGLU, RMSNorm.

    Source: Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288.
    """
    attention = AttentionSpec(n_heads=n_heads, n_kv_heads=n_kv_heads, rope_theta=rope_theta)
    blocks = (BlockSpec(attention, SwiGLUSpec(hidden=hidden)),) * n_layers
    return ModelSpec(d_model, blocks, Tokens(vocab_size), tie_head=tie_head)


def smollm2_135m() -> ModelSpec:
    """SmolLM2-135M. Source: Allal et al. 2025, arXiv:2502.02737."""
    return llama(576, 30, 9, 3, 1536, 49152, rope_theta=1e5, tie_head=True)


def llama_7b() -> ModelSpec:
    """LLaMA-7B. Source: Touvron et al. 2023, arXiv:2302.13971, table 2."""
    return llama(4096, 32, 32, 32, 11008, 32000)


def gpt2_124m() -> ModelSpec:
    """GPT-2, the smallest. Source: Radford et al. 2019, table 2 (there with another count)."""
    attention = AttentionSpec(12, position="none", qkv_bias=True, out_bias=True)
    block = BlockSpec(attention, MLPSpec(activation="gelu_tanh", bias=True), norm="layer")
    return ModelSpec(768, (block,) * 12, Tokens(50257, 1024), norm="layer", tie_head=True)


def mixtral_8x7b() -> ModelSpec:
    """Mixtral-8x7B: Llama's attention, and 2 of 8 experts. Source: arXiv:2401.04088, table 1."""
    attention = AttentionSpec(n_heads=32, n_kv_heads=8, rope_theta=1e6)
    block = BlockSpec(attention, MoESpec(n_experts=8, top_k=2, hidden=14336))
    return ModelSpec(4096, (block,) * 32, Tokens(32000))


def jamba_52b() -> ModelSpec:
    """Jamba-v0.1: 7 of 8 layers are Mamba-1, and every other one has 2 of 16 experts.

    Source: Lieber et al. 2024, arXiv:2403.19887, section 3.
    """
    mamba = MambaSpec(inner_norm="rms")
    attention = AttentionSpec(n_heads=32, n_kv_heads=8, position="none")
    dense = SwiGLUSpec(14336)
    sparse = MoESpec(n_experts=16, top_k=2, hidden=14336, normalize="all")
    blocks = pattern(
        "mMmMaMmM",
        n_layers=32,
        m=BlockSpec(mamba, dense),
        M=BlockSpec(mamba, sparse),
        a=BlockSpec(attention, dense),
    )
    return ModelSpec(4096, blocks, Tokens(65536), norm_eps=1e-6)


def qwen3_next_80b() -> ModelSpec:
    """Qwen3-Next-80B-A3B: 3 of 4 layers are Gated DeltaNet, the fourth is gated attention; 10 of
    512 experts, and one that all tokens share. Source: its config.json."""
    delta = GatedDeltaSpec(32, n_key_heads=16, key_head_dim=128)
    attention = AttentionSpec(
        16,
        2,
        head_dim=256,
        rope_theta=1e7,
        rope_dims=64,
        qk_norm=True,
        qk_norm_kind="rms_plus_one",
        gate=True,
    )
    mixture = MoESpec(n_experts=512, top_k=10, hidden=512, shared_hidden=512, shared_gate=True)
    blocks = pattern(
        "ddda",
        n_layers=48,
        d=BlockSpec(delta, mixture, "rms_plus_one"),
        a=BlockSpec(attention, mixture, "rms_plus_one"),
    )
    return ModelSpec(2048, blocks, Tokens(151936), norm="rms_plus_one", norm_eps=1e-6)


def free_transformer(plain: ModelSpec, *, n_bits: int = 16, free_bits: float = 0.5) -> ModelSpec:
    """The Free Transformer of a Transformer: its upper half reads the bits that an encoder chooses.

    The encoder is one more of its layers, over the whole document, with one learned query; the
    bits reach the keys and values of the first layer above.

    Args:
        plain: two layers of attention or more, such as a `llama`.
        n_bits, free_bits: of a token.

    Raises:
        SpecError: the middle layer is no block of attention with keys and values of its own.

    Source: Fleuret 2025, arXiv:2510.17558, section 3.
    Differs: bits are read one by one ("factored"), where the paper has 2^16 rows.
    """
    half = len(plain.blocks) // 2
    lower, upper = plain.blocks[:half], plain.blocks[half:]
    first = upper[0]
    rule = "it reads no other stream; give blocks of attention"
    require(isinstance(first, BlockSpec) and first.crosses, f"plain.blocks[{half}]", rule)
    assert isinstance(first, BlockSpec)
    sees_all = {"causal": False, "window": None, "kv_quant": "none"}
    mixer = MixerSpec.from_dict({**first.mixer.to_dict(), **sees_all})
    encoder = replace(first, mixer=mixer)
    latent = LatentSpec(
        upper, (encoder,), n_bits=n_bits, free_bits=free_bits, inject=("kv",), query="learned"
    )
    return plain.replace(blocks=(*lower, latent))


def free_transformer_routed(vocab_size: int = 65536) -> ModelSpec:
    """EvoForge's best pipeline: a routed Free Transformer with caches in 4 bits.

    Two layers in which every token chooses two of local attention, retention and Mamba; bits that
    a non-causal encoder of four layers chooses, read by FiLM, and by the first queries through a
    low rank; two layers of full attention, their cache a window of 8192. Heads are 128 wide, of
    which all entries are rotated.
    examples/full_size/free_transformer_routed.yaml spells it.

    Source: Fleuret 2025, arXiv:2510.17558, on the latent.
    Differs: the encoder reads what the routed layers leave, where EvoForge's read the embeddings,
        and its keys, which know the future, were read by them.
    """
    heads = {"n_heads": 8, "n_kv_heads": 2, "head_dim": 128}
    rope = {"rope_theta": 25000.0, "rope_dims": 128}
    near = AttentionSpec(**heads, **rope, window=1024, kv_quant="nf4")
    mixers = (near, RetentionSpec(n_heads=8, rope_theta=25000.0), MambaSpec(d_state=32))
    routed = RoutedSpec(mixers, top_k=2, temperature=0.7)
    far = AttentionSpec(**heads, **rope, window=8192, qk_norm=True, kv_quant="nf4")
    whole = AttentionSpec(**heads, **rope, causal=False)
    upper = LatentSpec(
        body=(BlockSpec(far, SwiGLUSpec(hidden=2240)),) * 2,
        encoder=(BlockSpec(whole, SwiGLUSpec(hidden=1920)),) * 4,
        inject=("film", "lora"),
        rank=4,
        lora_at="q",
    )
    lower = (BlockSpec(routed, SwiGLUSpec(hidden=2240)),) * 2
    return ModelSpec(640, (*lower, upper), Tokens(vocab_size))


def s4d(d_model: int, n_layers: int, vocab_size: int) -> ModelSpec:
    """S4D-Lin with 64 states per channel and a SwiGLU channel mixer.

    Source: Gu et al. 2022, arXiv:2206.11893. Differs: a token stem, and a channel mixer per layer.
    """
    blocks = (BlockSpec(S4DSpec(), SwiGLUSpec()),) * n_layers
    return ModelSpec(d_model, blocks, Tokens(vocab_size))


def _small_llama(d_model: int, n_layers: int, vocab_size: int) -> ModelSpec:
    heads = d_model // 16
    hidden = SwiGLUSpec().width(d_model)
    return llama(d_model, n_layers, heads, heads, hidden, vocab_size)


# Small models have small heads: 8 wide in RWKV, 16 in attention.
SMALL: dict[str, Callable[[int, int, int], ModelSpec]] = {
    "mamba": mamba,
    "rwkv": lambda d_model, n_layers, vocab_size: rwkv7(d_model, n_layers, vocab_size, 8),
    "s4": s4d,
    "transformer": _small_llama,
}
WIDTH_STEP = {"mamba": 8, "rwkv": 8, "s4": 8, "transformer": 16}
USUAL_ASPECT = 32  # d_model per layer: that of mamba_130m, and near that of gpt2's 64
CLOSE = 0.08


def at_size(family: str, n_params: int, *, vocab_size: int) -> ModelSpec:
    """The family's usual shape at a parameter budget.

    For each depth of 2 to 12 layers the width (a multiple of 8 or 16) nearest to the
    budget is found. Of the shapes within 8 % of the budget the one nearest to 32 channels per layer
    is taken; if there is none, the shape nearest to the budget.

    Args:
        family: "mamba", "rwkv", "s4" or "transformer".
        n_params: the budget, embeddings included.
        vocab_size: of the token stem.

    Raises:
        SpecError: an unknown family, or a budget that even the smallest model exceeds twofold.
    """
    if family not in SMALL:
        raise SpecError(f"family: {family!r} {unknown_name(family, SMALL)}")

    def made(steps: int, n_layers: int) -> tuple[int, ModelSpec]:
        spec = SMALL[family](steps * WIDTH_STEP[family], n_layers, vocab_size)
        return spec.cost(1).params, spec

    shapes: list[tuple[float, float, ModelSpec]] = []
    for n_layers in range(2, 13):
        low, high = 1, 2
        while made(high, n_layers)[0] < n_params:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if made(middle, n_layers)[0] < n_params else (low, middle)
        for params, spec in (made(low, n_layers), made(high, n_layers)):
            aspect = abs(math.log(spec.d_model / n_layers / USUAL_ASPECT))
            shapes.append((abs(params / n_params - 1), aspect, spec))
    miss, _, nearest = min(shapes, key=lambda shape: shape[0])
    if miss > 1:
        smallest = made(1, 2)[0]
        raise SpecError(f"n_params: {n_params} is too few for {family}; give at least {smallest}")
    close = [shape for shape in shapes if shape[0] <= CLOSE]
    return min(close, key=lambda shape: shape[1])[2] if close else nearest
