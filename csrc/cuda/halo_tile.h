// What the two halo kernels share: which pixels and images a block takes, and where its halo lies in the input.
#pragma once

#include "warp_tile.h"

namespace dsp {

struct HaloTile {
    int filters;        // number of the tile of filters
    int n0, x0, y0;     // first chunk of 8 images, first output pixel
    int n8;             // chunks of the batch
    int plane;          // chunks of a channel of x
    int width, chunks;  // of the halo
};

DSP_HD int halo_chunks(int tile_h, int tile_w, int tile_n) { return (tile_h + 2) * (tile_w + 2) * tile_n; }

DSP_FN HaloTile halo_tile(const ConvParams& p, int block) {
    const int across = block / p.tile_count, down = across / p.blocks_n, n8 = p.batch / 8;
    return {block % p.tile_count,
            across % p.blocks_n * p.tile_n,
            down % p.blocks_x * p.tile_w,
            down / p.blocks_x * p.tile_h,
            n8,
            p.height * p.width * n8,
            p.tile_w + 2,
            halo_chunks(p.tile_h, p.tile_w, p.tile_n)};
}

// Where chunk `place` of the halo lies in a channel's plane, or -1 outside of the image or the halo.
DSP_FN int halo_unit(const ConvParams& p, const HaloTile& at, int place) {
    const int pixel = place / p.tile_n, n = at.n0 + place - pixel * p.tile_n;
    const int row = pixel / at.width, y = at.y0 + row - p.pad_y, x = at.x0 + pixel - row * at.width - p.pad_x;
    const bool inside = place < at.chunks && n < at.n8 && is_inside(y, x, p.height, p.width);
    return inside ? (y * p.width + x) * at.n8 + n : -1;
}

// The sums of the thread's chunk into the output, where it has this pixel and these images.
template <class T, class K, class M>
DSP_FN void finish_pixel(M& m, const ConvParams& p, const HaloTile& at, int thread, int y, int x, int n) {
    if (y >= p.out_height || x >= p.out_width || n >= at.n8) return;
    const int plane = p.out_height * p.out_width * at.n8;
    finish_chunk<T, K>(m, p, thread, at.filters, plane, (y * p.out_width + x) * at.n8 + n);
}

}  // namespace dsp
