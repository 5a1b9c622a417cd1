// Implicit GEMM in NHWC, any batch: filters x (image, pixel) positions, the reduction in octets: eight channels at
// one tap. An octet that is an aligned run of channels is one 16-byte access, any other is loaded value by value; the
// next block's values wait in registers while this one is multiplied.
// SLICES: groups of 128 threads that share the reduction of one tile, each taking every SLICES-th block, where there
// are too few tiles to fill a GPU; their sums are added in shared memory, always in the same order. taps: two numbers
// per octet: first channel of an aligned run, or -1 - (its place in gather); dy << 16 | dx.
#pragma once

#include "warp_tile.cuh"

namespace dsp {

template <int FILTERS, int SLICES>
struct NhwcGemm {
    static constexpr int kBlocks = SLICES == 1 ? 4 : 1;  // resident per multiprocessor; bounds the registers
    static constexpr int kSlice = 128, kThreads = SLICES * kSlice, kPositions = 64, kOctets = 4, kStages = 2;
    static constexpr int kRows = kOctets * 8, kOutputs = kPositions;
    static constexpr int kFilters = FILTERS, kMT = FILTERS / 16, kNT = 2;
    static constexpr int kWeightBytes = FILTERS * kOctets * 16;
    static constexpr int kStageBytes = kWeightBytes + kPositions * kOctets * 16;
    static constexpr int kSumStride = FILTERS + 4;
    static constexpr int kSumBytes = kPositions * kSumStride * 4;  // of a slice
    static int shared_bytes(int) { return SLICES * std::max(kStages * kStageBytes, kSumBytes); }
    static constexpr int kMine = kOctets * kPositions / kSlice;  // octets of a thread in a block
    static_assert(kSumStride % 16 == 4, "store_by_position");
};

// Offset of an octet of a position, so that ldmatrix finds eight positions in all banks.
DSP_DEVICE int octet_place(int position, int octet) { return (position * 4 + (octet ^ (position >> 1 & 3))) * 16; }

struct NhwcColumn {
    int y, x;
    int64_t number;  // of the position's first tap, in numbers from x
};

DSP_DEVICE uint4 fetch_octet(const ConvParams& p, const NhwcColumn& column, int2 tap) {
    uint4 packed = {0, 0, 0, 0};
    const int dy = tap_y(tap.y), dx = tap_x(tap.y);
    const bool inside = is_inside(column.y + dy, column.x + dx, p.height, p.width);
    const uint16_t* pixel = static_cast<const uint16_t*>(p.x) +
                            (inside ? column.number + (static_cast<int64_t>(dy) * p.width + dx) * p.in_channels : 0);
    if (tap.x >= 0) {
        if (inside) packed = __ldg(reinterpret_cast<const uint4*>(pixel + tap.x));
        return packed;
    }
    const int* list = p.gather + (-1 - tap.x) * 8;
    uint32_t* word = &packed.x;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int channel = __ldg(list + i);
        const uint32_t bits = inside && channel >= 0 ? __ldg(pixel + channel) : 0;
        word[i / 2] |= bits << (i % 2 * 16);
    }
    return packed;
}

// Stores sums as float [position][filter]; stride % 16 == 4 avoids bank conflicts.
template <int MT, int NT>
DSP_DEVICE void store_by_position(const float (&sums)[MT][NT][4], int first_position, int stride) {
    float* shared = reinterpret_cast<float*>(shared_memory);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int filter = i * 16 + e / 2 * 8 + lane / 4;
                const int position = first_position + j * 8 + lane % 4 * 2 + e % 2;
                shared[position * stride + filter] = sums[i][j][e];
            }
}

// Eight filters at one position: one access if they write an aligned run of channels, else one by one. offset: of the
// first slice's sums; number: of the position, in numbers from out.
template <class T, class K, int SLICES>
DSP_DEVICE void finish_octet(const ConvParams& p, int row, int64_t number, int offset) {
    float value[8];
    load_eight(offset, false, value);
#pragma unroll
    for (int slice = 1; slice < SLICES; ++slice) {
        float more[8];
        load_eight(offset + slice * K::kSumBytes, false, more);
#pragma unroll
        for (int i = 0; i < 8; ++i) value[i] += more[i];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] += __ldg(p.bias + row + i);
    const int run = __ldg(p.runs + row / 8);
    if (run >= 0) return finish_eight<T>(p, value, (number + run) / 8);
    int channel[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        channel[i] = __ldg(p.rows + row + i);
        if (p.residual && channel[i] >= 0)
            value[i] += to_float<T>(static_cast<const uint16_t*>(p.residual)[number + channel[i]]);
    }
    activate(value, p.activation);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (channel[i] >= 0) static_cast<T*>(p.out)[number + channel[i]] = T(value[i]);
}

template <class T, int FILTERS, int SLICES>
__global__ void __launch_bounds__(NhwcGemm<FILTERS, SLICES>::kThreads, NhwcGemm<FILTERS, SLICES>::kBlocks)
    nhwc_gemm(const __grid_constant__ ConvParams p) {
    using K = NhwcGemm<FILTERS, SLICES>;
    const int block = blockIdx.x, thread = threadIdx.x, lane = thread % 32;
    const int slice = thread / K::kSlice, within = thread % K::kSlice, place = thread % K::kPositions;
    const int first_octet = within / K::kPositions * K::kMine;  // of those that this thread stages
    const int first_position = within / 32 * K::kNT * 8;        // of those that this warp multiplies
    const int tile_number = block % p.tile_count;
    const int position = block / p.tile_count * K::kPositions + place;
    const Tile tile = p.tiles[tile_number];
    const int image = p.out_height * p.out_width, positions = p.batch * image;

    const int n = position / image, row = (position - n * image) / p.out_width;
    NhwcColumn column;
    column.y = position < positions ? row * p.stride_y - p.pad_y : kOutside;
    column.x = (position - n * image - row * p.out_width) * p.stride_x - p.pad_x;
    column.number = ((static_cast<int64_t>(n) * p.height + column.y) * p.width + column.x) * p.in_channels;

    // Of the `round`-th block of the reduction of this slice.
    const auto stage_of = [&](int round) { return (slice * K::kStages + round % K::kStages) * K::kStageBytes; };
    const auto block_of = [&](int round) { return round * SLICES + slice; };
    uint4 ahead[K::kMine];
    const auto fetch = [&](int round) {
        const int k = block_of(round);
        if (k < tile.k_blocks) {
            const uint4* weights = static_cast<const uint4*>(p.weights) + tile.weights + k * (K::kWeightBytes / 16);
            if (within < K::kWeightBytes / 16) cp_async_16(stage_of(round) + within * 16, weights + within);
        }
        cp_async_commit();
        if (k >= tile.k_blocks) return;
        const int2* taps = reinterpret_cast<const int2*>(p.taps) + tile.taps + k * K::kOctets + first_octet;
#pragma unroll
        for (int i = 0; i < K::kMine; ++i) ahead[i] = fetch_octet(p, column, __ldg(taps + i));
    };
    const auto store = [&](int round) {
        if (block_of(round) >= tile.k_blocks) return;
        char* stage = shared_memory + stage_of(round) + K::kWeightBytes;
#pragma unroll
        for (int i = 0; i < K::kMine; ++i)
            *reinterpret_cast<uint4*>(stage + octet_place(place, first_octet + i)) = ahead[i];
    };

    float sums[K::kMT][K::kNT][4] = {};
    const int rounds = (tile.k_blocks + SLICES - 1) / SLICES;
    if (rounds > 0) {
        fetch(0);
        store(0);
    }
    for (int round = 0; round < rounds; ++round) {
        cp_async_wait<0>();
        __syncthreads();
        const bool more = round + 1 < rounds;
        if (more) fetch(round + 1);
        if (block_of(round) < tile.k_blocks) {
            const int stage = stage_of(round);
#pragma unroll
            for (int step = 0; step < K::kOctets / 2; ++step)
                multiply_step<T, false>(sums, stage, step, [&](int) {
                    return stage + K::kWeightBytes +
                           octet_place(first_position + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2);
                });
        }
        if (more) store(round + 1);
    }
    cp_async_wait<0>();
    __syncthreads();
    store_by_position(sums, slice * K::kPositions + first_position, K::kSumStride);
    __syncthreads();
    if (position >= positions) return;
#pragma unroll
    for (int octet = thread / K::kPositions; octet < FILTERS / 8; octet += K::kThreads / K::kPositions)
        finish_octet<T, K, SLICES>(p, tile_number * FILTERS + octet * 8,
                                   static_cast<int64_t>(position) * p.out_channels,
                                   (place * K::kSumStride + octet * 8) * 4);
}

}  // namespace dsp
