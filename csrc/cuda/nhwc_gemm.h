// Implicit GEMM in NHWC, any batch: filters x (image, pixel) positions, the reduction in octets: eight channels at
// one tap. An octet that is an aligned run of channels is one 16-byte access, any other is loaded value by value; the
// next block's values wait in registers while this one is multiplied.
// SLICES: groups of 128 threads that share the reduction of one tile, each taking every SLICES-th block, where there
// are too few tiles to fill a GPU; their sums are added in shared memory, always in the same order. taps: one Pair per
// octet: {first channel of an aligned run, or -1 - (its place in gather), dy << 16 | dx}.
#pragma once

#include "warp_tile.h"

namespace dsp {

template <class T, int FILTERS, int SLICES = 1>
struct NhwcGemm {
    static constexpr int kBlocks = SLICES == 1 ? 4 : 1;  // resident per multiprocessor; bounds the registers
    static constexpr int kSlice = 128, kThreads = SLICES * kSlice, kPositions = 64, kOctets = 4, kStages = 2;
    static constexpr int kMT = FILTERS / 16, kNT = 2;
    static constexpr int kWeightBytes = FILTERS * kOctets * 16;
    static constexpr int kStageBytes = kWeightBytes + kPositions * kOctets * 16;
    static constexpr int kSumStride = FILTERS + 4;
    static constexpr int kSumBytes = kPositions * kSumStride * 4;  // of a slice
    static constexpr int kSharedBytes =
        SLICES * (kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes);
    static constexpr int kMine = kOctets * kPositions / kSlice;  // octets of a thread in a block
    static_assert(kSumStride % 16 == 4, "store_by_position");

    struct Column {
        int y, x;
        int64_t number;  // of the position's first tap, in numbers from x
    };
    struct Ahead {
        Vec16 octet[kMine];
    };

    DSP_HD static int swizzled(int position, int octet) {
        return (position * kOctets + (octet ^ (position >> 1 & 3))) * 16;
    }

    template <class M>
    DSP_FN static Vec16 fetch(M& m, const ConvParams& p, const Column& c, Pair tap) {
        Vec16 packed = {{0, 0, 0, 0}};
        const int dy = tap_y(tap.second), dx = tap_x(tap.second);
        const bool inside = is_inside(c.y + dy, c.x + dx, p.height, p.width);
        const uint16_t* pixel = static_cast<const uint16_t*>(p.x) +
                                (inside ? c.number + (static_cast<int64_t>(dy) * p.width + dx) * p.in_channels : 0);
        if (tap.first >= 0) {
            if (inside) packed = m.read(reinterpret_cast<const Vec16*>(pixel + tap.first));
        } else {
            const int* list = p.gather + (-1 - tap.first) * 8;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int channel = m.read(list + i);
                const uint32_t bits = inside && channel >= 0 ? m.read(pixel + channel) : 0;
                packed.word[i / 2] |= bits << (i % 2 * 16);
            }
        }
        return packed;
    }

    template <class M>
    DSP_FN static void run(M& m, const ConvParams& p, int block) {
        const int tile_number = block % p.tile_count;
        const int first_position = block / p.tile_count * kPositions;
        const Tile tile = p.tiles[tile_number];
        const int image = p.out_height * p.out_width, positions = p.batch * image;

        typename M::template PerThread<Column> columns;
        typename M::template PerThread<Ahead> ahead;
        m.each_thread([&](int thread) {
            const int position = first_position + thread % kPositions;
            const int n = position / image, row = (position - n * image) / p.out_width;
            Column& c = columns[thread];
            c.y = position < positions ? row * p.stride_y - p.pad_y : kOutside;
            c.x = (position - n * image - row * p.out_width) * p.stride_x - p.pad_x;
            c.number = ((static_cast<int64_t>(n) * p.height + c.y) * p.width + c.x) * p.in_channels;
        });

        // Of the `round`-th block of the reduction of every slice.
        const auto stage_of = [](int slice, int round) { return (slice * kStages + round % kStages) * kStageBytes; };
        const auto block_of = [](int slice, int round) { return round * SLICES + slice; };
        const auto copy_weights = [&](int round) {
            m.each_thread([&](int thread) {
                const int slice = thread / kSlice, unit = thread % kSlice, k_block = block_of(slice, round);
                const Vec16* weights =
                    static_cast<const Vec16*>(p.weights) + tile.weights + k_block * (kWeightBytes / 16);
                if (unit < kWeightBytes / 16 && k_block < tile.k_blocks)
                    m.copy16(thread, stage_of(slice, round) + unit * 16, weights + unit, true);
            });
            m.commit();
        };
        const auto fetch_block = [&](int round) {
            m.each_thread([&](int thread) {
                const int k_block = block_of(thread / kSlice, round);
                if (k_block >= tile.k_blocks) return;
                const Pair* taps = reinterpret_cast<const Pair*>(p.taps) + tile.taps + k_block * kOctets;
#pragma unroll
                for (int i = 0; i < kMine; ++i)
                    ahead[thread].octet[i] =
                        fetch(m, p, columns[thread], m.read(taps + thread % kSlice / kPositions * kMine + i));
            });
        };
        const auto store_block = [&](int round) {
            m.each_thread([&](int thread) {
                const int slice = thread / kSlice;
                if (block_of(slice, round) >= tile.k_blocks) return;
#pragma unroll
                for (int i = 0; i < kMine; ++i)
                    m.store16(thread,
                              stage_of(slice, round) + kWeightBytes +
                                  swizzled(thread % kPositions, thread % kSlice / kPositions * kMine + i),
                              ahead[thread].octet[i]);
            });
        };

        typename M::template PerWarp<Sums<M, kMT, kNT>> sums;
        m.each_warp([&](int warp) { clear(sums[warp]); });
        const int rounds = (tile.k_blocks + SLICES - 1) / SLICES;
        if (rounds > 0) {
            copy_weights(0);
            fetch_block(0);
            store_block(0);
        }
        for (int round = 0; round < rounds; ++round) {
            m.template wait<0>();
            m.sync();
            const bool more = round + 1 < rounds;
            if (more) {
                copy_weights(round + 1);
                fetch_block(round + 1);
            }
            m.each_warp([&](int warp) {
                const int slice = warp / (kSlice / 32), first = warp % (kSlice / 32) * kNT * 8;
                if (block_of(slice, round) >= tile.k_blocks) return;
                const int stage = stage_of(slice, round);
#pragma unroll
                for (int step = 0; step < kOctets / 2; ++step)
                    multiply_step<T, false>(m, warp, sums[warp], stage, step, [&](int, int lane) {
                        return stage + kWeightBytes +
                               swizzled(first + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2);
                    });
            });
            if (more) store_block(round + 1);
        }
        m.template wait<0>();
        m.sync();
        m.each_warp([&](int warp) {
            const int slice = warp / (kSlice / 32), first = warp % (kSlice / 32) * kNT * 8;
            store_by_position(m, warp, sums[warp], slice * kPositions + first, kSumStride);
        });
        m.sync();
        m.each_thread([&](int thread) {
            const int place = thread % kPositions;
            if (first_position + place >= positions) return;
            const int64_t number = static_cast<int64_t>(first_position + place) * p.out_channels;
#pragma unroll
            for (int octet = thread / kPositions; octet < FILTERS / 8; octet += kThreads / kPositions)
                finish_octet(m, p, thread, tile_number * FILTERS + octet * 8, number,
                             (place * kSumStride + octet * 8) * 4);
        });
    }

    // Eight filters at one position: one access if they write an aligned run of channels, else one by one.
    template <class M>
    DSP_FN static void finish_octet(M& m, const ConvParams& p, int thread, int row, int64_t number, int offset) {
        float value[8], bias[8];
        load_eight(m, thread, offset, false, value);
#pragma unroll
        for (int slice = 1; slice < SLICES; ++slice) {
            float more[8];
            load_eight(m, thread, offset + slice * kSumBytes, false, more);
#pragma unroll
            for (int i = 0; i < 8; ++i) value[i] += more[i];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) bias[i] = m.read(p.bias + row + i);
        const int run = m.read(p.runs + row / 8);
        if (run >= 0) {
            finish_eight<T>(m, p, value, bias, (number + run) / 8);
            return;
        }
        int channel[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            channel[i] = m.read(p.rows + row + i);
            value[i] += bias[i];
            if (p.residual && channel[i] >= 0)
                value[i] += T::widen(m.read_residual(static_cast<const uint16_t*>(p.residual) + number + channel[i]));
        }
        activate(value, p.activation);
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (channel[i] >= 0) m.write(static_cast<uint16_t*>(p.out) + number + channel[i], T::narrow(value[i]));
    }
};

}  // namespace dsp
