"""The Triton kernel: gather, all groups, bias, residual, activation and scatter in one launch.

The convolution is a matrix product per group: columns (output pixels x images) times K (taps x channels)
times filters. In both layouts a program reads ``x[column base + offset of k]``; only which of the two is
contiguous differs, so one kernel serves both. tables.py makes the tables that it reads.
"""

import triton
import triton.language as tl

# Not specialised, because they differ from layer to layer: the kernel states the divisibility it relies on.
INTEGER_ARGUMENTS = (
    *("n_tiles", "col_tiles", "block", "batch", "in_channels", "out_channels", "in_h", "in_w", "out_h"),
    *("out_w", "stride_h", "stride_w", "pad_h", "pad_w"),
)


def conv_kernel_function(  # type: ignore[no-untyped-def]  # triton reads annotations its own way
    x_ptr,
    out_ptr,
    residual_ptr,
    w_ptr,
    bias_ptr,
    k_ptr,
    tile_ptr,
    filter_ptr,
    n_tiles,
    col_tiles,
    block,
    batch,
    in_channels,
    out_channels,
    in_h,
    in_w,
    out_h,
    out_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    CHWN: tl.constexpr,
    COLS: tl.constexpr,
    IMAGES: tl.constexpr,
    FILTERS: tl.constexpr,
    BK: tl.constexpr,
    POINTWISE: tl.constexpr,
    WIDE_IN: tl.constexpr,
    WIDE_OUT: tl.constexpr,
    BIG: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    CACHE: tl.constexpr,
    EXACT: tl.constexpr,
) -> None:
    """One program computes COLS columns of FILTERS filters of one group.

    x, out, residual: (C, H, W, N) if CHWN, else (N, H, W, C), contiguous.
    WIDE_IN, WIDE_OUT: the channels read, written are aligned runs of 8 (NHWC; CHWN is always wide).
    BIG: a tensor has 2**31 elements or more.
    EXACT: convert operands to float32 before the product; the interpreter needs it for bfloat16.
    """
    # Programs that run concurrently share their columns in L2; among those, the tiles with most work start
    # first (tile 0 is the largest).
    pid = tl.program_id(0)
    first_col = (pid // (block * n_tiles)) * block
    rest = pid % (block * n_tiles)
    size = tl.minimum(block, col_tiles - first_col)
    tile = rest // size
    col_tile = first_col + rest % size
    if BIG:
        col_tile = col_tile.to(tl.int64)
        in_h = in_h.to(tl.int64)
        out_h = out_h.to(tl.int64)
        in_channels = in_channels.to(tl.int64)
        out_channels = out_channels.to(tl.int64)
    if CHWN:
        # True for every caller; stated for 16-byte accesses.
        batch = (batch // 8) * 8
    if WIDE_IN:
        in_channels = (in_channels // 8) * 8
    if WIDE_OUT:
        out_channels = (out_channels // 8) * 8

    # -- columns: base addresses and the input pixel under tap (0, 0)
    col = tl.arange(0, COLS)
    pixels = out_h * out_w
    if CHWN:
        chunks = batch // IMAGES
        image = (col_tile % chunks) * IMAGES + col % IMAGES
        pixel = (col_tile // chunks) * (COLS // IMAGES) + col // IMAGES
        col_live = pixel < pixels
        out_col = pixel * batch + image
        pixel_step = batch
        channel_step = in_h * in_w * batch
        filter_step = pixels * batch
    else:
        position = col_tile * COLS + col
        col_live = position < batch * pixels
        image = position // pixels
        pixel = position % pixels
        out_col = position * out_channels
        pixel_step = in_channels
        channel_step = 1
        filter_step = 1
    y = (pixel // out_w) * stride_h - pad_h
    x = (pixel % out_w) * stride_w - pad_w
    if CHWN:
        x_col = (y * in_w + x) * batch + image
        x_col = tl.max_contiguous(tl.multiple_of(x_col, 8), 8)
        out_col = tl.max_contiguous(tl.multiple_of(out_col, 8), 8)
    else:
        x_col = ((image * in_h + y) * in_w + x) * in_channels
    # Columns past the end are out of bounds for every tap.
    y = tl.where(col_live, y, -(1 << 24))
    col_inside = (y >= 0) & (y < in_h) & (x >= 0) & (x < in_w)

    # -- the product
    k = tl.arange(0, BK)
    f = tl.arange(0, FILTERS)
    k_ptrs = k_ptr + tl.load(tile_ptr + 3 * tile) * BK + k
    steps = tl.load(tile_ptr + 3 * tile + 1)
    w_ptrs = w_ptr + tl.load(tile_ptr + 3 * tile + 2) * (BK * FILTERS) + k[:, None] * FILTERS + f[None, :]
    acc = tl.full([COLS, FILTERS], 0.0, tl.float32)
    for _ in range(steps):
        entry = tl.load(k_ptrs)
        channel = entry & 0xFFFF
        if BIG:
            channel = channel.to(tl.int64)
        offset = channel * channel_step
        if POINTWISE:
            inside = col_inside[:, None] & (entry >= 0)[None, :]
        else:
            dy = (entry >> 16) & 0xFF
            dx = (entry >> 24) & 0x7F
            offset += (dy * in_w + dx) * pixel_step
            dy = tl.where(entry >= 0, dy, -(1 << 24))
            tap_y = y[:, None] + dy[None, :]
            tap_x = x[:, None] + dx[None, :]
            inside = (tap_y >= 0) & (tap_y < in_h) & (tap_x >= 0) & (tap_x < in_w)
        if CHWN:
            inside = tl.max_constancy(inside, [8, 1])
        if WIDE_IN:
            inside = tl.max_constancy(inside, [1, 8])
        read = x_col[:, None] + offset[None, :]
        if WIDE_IN:
            read = tl.max_contiguous(tl.multiple_of(read, [1, 8]), [1, 8])
        a = tl.load(x_ptr + read, mask=inside, other=0.0, cache_modifier=CACHE)
        b = tl.load(w_ptrs)
        if EXACT:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        k_ptrs += BK
        w_ptrs += BK * FILTERS

    # -- bias, residual, activation, scatter
    acc += tl.load(bias_ptr + tile * FILTERS + f)[None, :]
    channel = tl.load(filter_ptr + tile * FILTERS + f)
    live = col_live[:, None] & (channel >= 0)[None, :]
    if BIG:
        channel = channel.to(tl.int64)
    out_filter = tl.maximum(channel, 0) * filter_step
    if CHWN:
        live = tl.max_constancy(live, [8, 1])
    if WIDE_OUT:
        live = tl.max_constancy(live, [1, 8])
    where = out_col[:, None] + out_filter[None, :]
    if WIDE_OUT:
        where = tl.max_contiguous(tl.multiple_of(where, [1, 8]), [1, 8])
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + where, mask=live, other=0.0).to(tl.float32)
    # Comparisons are false for NaN, which is therefore kept, as in torch.
    if ACTIVATION == 1:
        acc = tl.where(acc <= 0.0, 0.0, acc)
    elif ACTIVATION == 2:
        acc = tl.where(acc <= 0.0, 0.0, tl.where(acc >= 6.0, 6.0, acc))
    elif ACTIVATION == 3:
        acc = acc / (1.0 + tl.exp(-acc))
    elif ACTIVATION == 4:
        gate = acc + 3.0
        acc = acc * tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate)) * (1.0 / 6.0)
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=live)


conv_kernel = triton.jit(conv_kernel_function, do_not_specialize=list(INTEGER_ARGUMENTS))
