"""Attention, and the one place that chooses its kernel."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxchat.sharding import row_axes

QUERY_BLOCK = 128  # "blocks": queries taken together; smaller skips more of the mask, larger multiplies faster
LANES = 128  # splash: time and (above 64) head dimension are filled up to a multiple
SPLASH_BLOCK = 512  # queries and keys that splash takes at a time, where that divides the time

SLOT_BLOCK = 32  # slots of a cache taken together where one token a row is decoded,
SLOT_ROWS = 32  # and rows


def causal_attention(q_BTNH, k_BTKH, v_BTKH, implementation: str, segments_BT=None, mesh: Mesh | None = None):
    """Each position attends to itself and those before it; softmax in float32, scale 1/√H. -> [B, T, N, H].

    K may divide N: then N/K query heads in a row share one key/value head. Queries and keys must be normed.
    segments_BT: only to those of its own segment.
    implementation: "blocks" is ours, for CPUs; "splash" JAX's kernel for TPUs; "xla" and "cudnn" are jax.nn's; see
        kernel_for.
    mesh: each device computes its own rows and heads, whatever the kernel; nothing crosses devices.
    """
    attend = KERNELS[kernel_for(implementation, q_BTNH.shape[3], q_BTNH.shape[1])]
    if mesh is None or mesh.size == 1:
        return attend(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    rows = row_axes(mesh, q_BTNH.shape[0])
    heads = P(rows, None, "tensor")
    in_specs = (heads, heads, heads, P(rows))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, segments_BT)


def kernel_for(implementation: str, head_dim: int, time: int) -> str:
    """The kernel that is taken: `implementation`, or "xla" for shapes that "cudnn" refuses.

    Those are head dimensions that are no multiple of 8 or above 256 (128 before Hopper), and in training an odd time.
    """
    if implementation != "cudnn":
        return implementation
    capability = getattr(jax.local_devices()[0], "compute_capability", "9.0")  # no GPU: compiled for one of Hopper's
    largest = 256 if float(capability) >= 9 else 128
    able = head_dim % 8 == 0 and head_dim <= largest and time % 2 == 0
    return "cudnn" if able else "xla"


def library_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, implementation: str):
    """jax.nn's. Segments are a mask [B, 1, T, S], which cuDNN reads as a bias: T² bfloat16 numbers a row."""
    same = (
        None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    )  # [B, 1, T, S]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same, is_causal=True, implementation=implementation
    )


def splash_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, interpret: bool = False):
    """JAX's block-sparse kernel for TPUs: what the mask drops is never computed, and no scores reach memory.

    Its lanes want multiples of 128. Zeros fill up: keys at the end come after every query, features add 0 to a score.
    interpret: run it by XLA operations, on any device.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, T, N, H = q_BTNH.shape
    more_T, more_H = -T % LANES, -H % (LANES if H > 64 else 64)
    scaled = (q_BTNH / math.sqrt(H)).astype(q_BTNH.dtype)
    padded = [jnp.pad(a, ((0, 0), (0, more_T), (0, 0), (0, more_H))) for a in (scaled, k_BTKH, v_BTKH)]
    size = next(n for n in (SPLASH_BLOCK, SPLASH_BLOCK // 2, LANES) if (T + more_T) % n == 0)
    sizes = kernels.BlockSizes(
        block_q=size, block_kv=size, block_kv_compute=size, block_q_dkv=size, block_kv_dkv=size,
        block_kv_dkv_compute=size, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((T + more_T, T + more_T))] * N)
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


def block_causal_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
    """Block after block of queries, each with no more keys than its last query may see: what the mask drops is mostly
    never computed. Normed queries and keys bound a score by √H (11 at H = 128), so exp needs no maximum taken off.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    # Heads before time, contiguous: matrix products over the last two axes. G = N/K query heads share a key head.
    q_BKGTH = jnp.moveaxis((q_BTNH / math.sqrt(H)).reshape(B, T, K, N // K, H), 1, 3)
    k_BKSH, v_BKSH = jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2)
    blocks = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        seen = (jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None])[None, None, None]  # [B, K, G, t, s]
        if segments_BT is not None:
            seen = seen & (segments_BT[:, start:end, None] == segments_BT[:, None, :end])[:, None, None]
        scores_BKGts = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., start:end, :], k_BKSH[:, :, :end], preferred_element_type=jnp.float32
        )
        p_BKGts = jnp.where(seen, jnp.exp(scores_BKGts), 0.0)
        y_BKGtH = jnp.einsum("bkgts,bksh->bkgth", p_BKGts.astype(v_BKSH.dtype), v_BKSH[:, :, :end])
        blocks.append((y_BKGtH / p_BKGts.sum(-1, keepdims=True)).astype(q_BTNH.dtype))
    return jnp.moveaxis(jnp.concatenate(blocks, axis=3), 3, 1).reshape(B, T, N, H)


KERNELS = {
    "blocks": block_causal_attention,
    "splash": splash_attention,
    "xla": partial(library_attention, implementation="xla"),
    "cudnn": partial(library_attention, implementation="cudnn"),
}


def cached_attention(q_BTNH, k_BSKH, v_BSKH, positions_BT):
    """Attend to the cache slots at or before each query's own position. -> [B, T, N, H]."""
    slots_S = jnp.arange(k_BSKH.shape[1])
    mask_BTS = slots_S[None, None, :] <= positions_BT[:, :, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation="xla")


def decoding_attention(q_B1NH, k_LBSKH, v_LBSKH, layer: int, positions_B):
    """For CPUs: attention of one token a row to the slots of its layer at or before its own position. -> [B, 1, N, H].

    Block after block of slots, of some rows at a time, as far as the longest of these reaches; what lies beyond a row's
    own end adds exactly 0, so its result does not depend on how long the others are. Normed queries and keys: see
    block_causal_attention.
    """
    (B, _, N, H), (_, _, S, K, _) = q_B1NH.shape, k_LBSKH.shape
    R, block = math.gcd(B, SLOT_ROWS), math.gcd(S, SLOT_BLOCK)
    q_BKGH = (q_B1NH.astype(jnp.float32) / math.sqrt(H)).reshape(B, K, N // K, H)
    blocks_M = jnp.minimum(jnp.max(positions_B.reshape(-1, R), axis=1) // block + 1, S // block)  # of M groups of rows
    ends_M = jnp.cumsum(blocks_M)

    def add_block(n, found):  # products and sums, which are five times as fast as matrix products here
        m = jnp.searchsorted(ends_M, n, side="right")
        row, slot = m * R, (n - ends_M[m] + blocks_M[m]) * block

        def rows(array):
            return jax.lax.dynamic_slice_in_dim(array, row, R)

        k_RsKH, v_RsKH = (
            jax.lax.dynamic_slice(a, (layer, row, slot, 0, 0), (1, R, block, K, H))[0] for a in (k_LBSKH, v_LBSKH)
        )
        seen_Rs1 = (slot + jnp.arange(block)[None, :, None]) <= rows(positions_B)[:, None, None]
        q_RKGH, added = rows(q_BKGH), []
        for g, (sum_BK, y_BKH) in enumerate(found):
            scores_RsK = jnp.sum(q_RKGH[:, None, :, g] * k_RsKH, axis=-1)
            p_RsK = jnp.where(seen_Rs1, jnp.exp(scores_RsK), 0.0)
            sum_RK = rows(sum_BK) + p_RsK.sum(1)
            y_RKH = rows(y_BKH) + jnp.sum(p_RsK[..., None] * v_RsKH, axis=1)
            put = jax.lax.dynamic_update_slice_in_dim
            added.append((put(sum_BK, sum_RK, row, 0), put(y_BKH, y_RKH, row, 0)))
        return added

    nothing = [(jnp.zeros((B, K)), jnp.zeros((B, K, H))) for _ in range(N // K)]
    found = jax.lax.fori_loop(0, ends_M[-1], add_block, nothing)
    y_BKGH = jnp.stack([y_BKH / sum_BK[..., None] for sum_BK, y_BKH in found], axis=2)
    return y_BKGH.reshape(B, 1, N, H).astype(q_B1NH.dtype)
