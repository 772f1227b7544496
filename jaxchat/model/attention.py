"""Attention for training and decoding, with a choice of kernels for CPUs, GPUs and TPUs."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.config import gpu_capability
from jaxchat.model.attention_cpu import block_causal_attention, decoding_attention
from jaxchat.sharding import per_device, row_axes

LANES = 128  # splash: time and head dimensions above 64 are padded to a multiple
SPLASH_BLOCKS = (1024, 512, 256, LANES)  # splash: queries and keys per block
SPLIT = 128  # decoding on GPUs and TPUs: cache slots that are read together
PAGES = 4  # decoding on TPUs: pages of SPLIT slots that are fetched at a time


def causal_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    implementation: str,
    segments_BT=None,
    mesh: Mesh | None = None,
    window: int | None = None,
):
    """Compute causal attention with the softmax in float32 and the scale 1/√H. Return [B, T, N, H].

    Each key/value head serves N/K consecutive query heads. Queries and keys must be RMS-normalized.
    segments_BT: segment id of each position. A position attends only to positions of the same segment.
    window: how many earlier positions a position attends to; None: all.
    implementation: "blocks" (attention_cpu.py), "splash" (JAX's kernel for TPUs), or "xla" or "cudnn" for
        jax.nn.dot_product_attention. Where cuDNN does not support the shapes, "cudnn" is replaced by "xla".
    mesh: the mesh over which rows and heads are sharded; None: one device.
    """
    attend = KERNELS[kernel_for(implementation, q_BTNH.shape[3], q_BTNH.shape[1])]
    if window is not None and window < q_BTNH.shape[1] - 1:
        attend = partial(attend, window=window)
    rows = None if mesh is None else row_axes(mesh, q_BTNH.shape[0])
    heads = P(rows, None, "tensor")
    attend = per_device(attend, mesh, (heads, heads, heads, P(rows)), heads)
    return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def cached_attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, implementation: str, window: int | None = None):
    """Compute attention of new tokens to one layer's cache of S slots. Return [B, T, N, H].

    A token attends to the cache's slots up to its own position. The cache must already hold the new tokens.
    window: how many earlier positions a token attends to; None: all.
    implementation: "blocks", "splash", "cudnn" or "xla"; ignored for more than one new token per row.
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    if T == 1 and (kernel := DECODING.get(decoding_kernel_for(implementation, H, window))):
        return kernel(q_BTNH, k_BKSH, v_BKSH, positions_BT[:, 0], window)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = jnp.einsum("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    scores_BKGTS = scores_BKGTS / math.sqrt(H)
    seen_BTS = jnp.arange(S)[None, None, :] <= positions_BT[:, :, None]
    if window is not None and window < S - 1:
        seen_BTS &= jnp.arange(S)[None, None, :] >= positions_BT[:, :, None] - window
    p_BKGTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bksh->btkgh", p_BKGTS.astype(q_BTNH.dtype), v_BKSH).reshape(B, T, N, H)


def decoding_kernel_for(implementation: str, head_dim: int, window: int | None) -> str:
    """Return the implementation of attention that is used for one new token per row.

    This is `implementation`, or "xla" if its kernel does not support the head dimension or the window.
    """
    computes = {
        "cudnn": head_dim >= 16 and head_dim & (head_dim - 1) == 0,  # sides of Triton's tiles
        "splash": head_dim % LANES == 0 and window is None,
    }
    return implementation if computes.get(implementation, True) else "xla"


def gpu_decoding_attention(
    q_B1NH, k_BKSH, v_BKSH, positions_B, window: int | None = None, *, interpret: bool = False
):
    """Compute attention of one new token per row with JAX's decoding kernel for GPUs. Return [B, 1, N, H].

    window: how many earlier positions the token attends to; None: all.
    interpret: whether to run in Pallas's interpreter, which works on any device.
    """
    from jax.experimental.pallas.ops.gpu.decode_attention import gqa

    S = k_BKSH.shape[2]
    split = math.gcd(S, SPLIT)
    # gqa takes slots before heads and swaps the axes back, so nothing is copied.
    k_BSKH, v_BSKH = jnp.swapaxes(k_BKSH, 1, 2), jnp.swapaxes(v_BKSH, 1, 2)
    first_B = None if window is None else jnp.maximum(positions_B - window, 0)
    y_BNH = gqa(
        q_B1NH[:, 0], k_BSKH, v_BSKH, first_B, jnp.minimum(positions_B + 1, S), block_k=split,
        k_splits=S // split, interpret=interpret,
    )  # fmt: skip
    return y_BNH[:, None].astype(q_B1NH.dtype)


def tpu_decoding_attention(q_B1NH, k_BKSH, v_BKSH, positions_B, window: None = None):
    """Compute attention of one new token per row with JAX's paged attention for TPUs. Return [B, 1, N, H].

    window: must be None, because the kernel supports no windows.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    (B, _, N, H), (_, K, S, _) = q_B1NH.shape, k_BKSH.shape
    page = math.gcd(S, SPLIT)
    pages = S // page
    k_1PpH, v_1PpH = (a.reshape(1, B * K * pages, page, H) for a in (k_BKSH, v_BKSH))
    lengths_BK = jnp.repeat(jnp.minimum(positions_B + 1, S), K)
    y = paged_attention(
        (q_B1NH / math.sqrt(H)).astype(q_B1NH.dtype).reshape(B * K, N // K, H), k_1PpH, v_1PpH, lengths_BK,
        jnp.arange(B * K * pages).reshape(B * K, pages), pages_per_compute_block=math.gcd(pages, PAGES),
    )  # fmt: skip
    return y.reshape(B, 1, N, H).astype(q_B1NH.dtype)


def kernel_for(implementation: str, head_dim: int, time: int) -> str:
    """Return `implementation`, or "xla" if it is "cudnn" and cuDNN does not support the shapes.

    cuDNN needs an even number of positions (`time`), and a head dimension that is a multiple of 8 and at most
    256 (on GPUs before Hopper, 128).
    """
    if implementation != "cudnn":
        return implementation
    largest = 256 if gpu_capability() >= 9 else 128
    return "cudnn" if head_dim % 8 == 0 and head_dim <= largest and time % 2 == 0 else "xla"


def library_attention(
    q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, implementation: str, window: int | None = None
):
    """Compute causal attention with jax.nn.dot_product_attention. Return [B, T, N, H].

    segments_BT: segment id of each position. implementation: "xla" or "cudnn".
    """
    same_B1TS = None
    if segments_BT is not None:
        same_B1TS = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    options = {"is_causal": True, "local_window_size": None if window is None else (window, 0)}
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_B1TS, implementation=implementation, **options
    )


def splash_block(time: int, window: int | None) -> int:
    """Return how many queries, and how many keys, are in a block of the splash kernel.

    This is the largest of SPLASH_BLOCKS that divides `time` and is at most max(256, min(time, window) ÷ 4).
    time: positions per row. window: how many earlier positions a position attends to; None: all.
    """
    most = max(256, min(time, time if window is None else window) // 4)
    return next(size for size in SPLASH_BLOCKS if size <= most and time % size == 0)


def splash_attention(
    q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, window: int | None = None, interpret: bool = False
):
    """Compute causal attention with JAX's splash kernel for TPUs. Return [B, T, N, H].

    Arrays are padded with zeros to sizes that the kernel supports, which does not change the result.
    interpret: whether to run in Pallas's interpreter, which works on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = q_BTNH.shape
    more_T, more_H = -T % LANES, -H % (LANES if H > 64 else 64)
    scaled = (q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype)
    padded = [jnp.pad(a, ((0, 0), (0, more_T), (0, 0), (0, more_H))) for a in (scaled, k_BTKH, v_BTKH)]
    size = splash_block(T + more_T, window)
    sizes = kernels.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
        block_kv_dkv_compute=size, use_fused_bwd_kernel=True,
    )  # fmt: skip
    size_TT = (T + more_T, T + more_T)
    mask = masks.CausalMask(size_TT) if window is None else masks.LocalMask(size_TT, (window, 0), 0)
    mask = masks.MultiHeadMask([mask] * N)
    with jax.ensure_compile_time_eval():  # the kernel's tables of blocks are constants
        kernel = kernels.make_splash_mha(
            mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )
    segments = None
    if segments_BT is not None:
        segments_BT = jnp.pad(segments_BT, ((0, 0), (0, more_T)), constant_values=-1)
        segments = kernels.SegmentIds(q=segments_BT, kv=segments_BT)
    y_BNTH = jax.vmap(kernel)(*(jnp.swapaxes(a, 1, 2) for a in padded), segments)
    return jnp.swapaxes(y_BNTH, 1, 2)[:, :T, :, :H]


KERNELS = {
    "blocks": block_causal_attention,
    "splash": splash_attention,
    "xla": partial(library_attention, implementation="xla"),
    "cudnn": partial(library_attention, implementation="cudnn"),
}
DECODING = {"blocks": decoding_attention, "cudnn": gpu_decoding_attention, "splash": tpu_decoding_attention}
