// Convolutions by AMX, included by impl.h: products of matrices of weights, 16 filters x 16 words, and of 16 rows of
// words x 16 lanes. On Sapphire Rapids a product takes 16 cycles however small its matrices are, and a load whose rows
// cross cache lines 55 instead of 9, so only aligned rows are read in place.
#pragma once

namespace dsp {
namespace {

// What LDTILECFG reads. Registers: sums [filters][vectors] 0 to 3, weights 4 and 5, words 6 and 7.
struct alignas(64) MatrixShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(MatrixShapes) == 64);

#ifdef DSP_MATRIX_PRICE // tests
constexpr double matrix_price = DSP_MATRIX_PRICE;
#else
constexpr double matrix_price = 1.0;
#endif

#ifdef DSP_EMULATED_AMX
#include "emulated_amx.h" // in tests/helpers
#else

inline void configure(const MatrixShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }

void end_matrices() { asm volatile("tilerelease"); }

// By assembly: GCC 12's intrinsics do not say that they read and write memory.
template <int R>
inline void load_matrix(const float* p, int64_t pitch) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(pitch), "i"(R) : "memory");
}

template <int R>
inline void store_matrix(float* p) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t(64)), "i"(R) : "memory");
}

template <int R>
inline void clear_matrix() {
    asm volatile("tilezero %%tmm%c0" : : "i"(R));
}

// Adds the products of weights A and words B to the sums C. Weights are bytes with sign, words bytes without.
template <bool integers, int C, int A, int B>
inline void multiply_matrices() {
    if constexpr (integers)
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    else
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

#endif

constexpr int matrix_floats = 16 * L;

void begin_matrices(int height) {
    MatrixShapes shapes;
    shapes.row_bytes[4] = shapes.row_bytes[5] = uint16_t(4 * height);
    shapes.rows[6] = shapes.rows[7] = uint8_t(height);
    configure(shapes);
}

// Rows that fill no matrix are zeros: the weights beside them are 0, but a NaN times 0 is a NaN.
inline void gather_matrix(const MatrixRows& rows, int n) {
    const int32_t* const off = rows.off + 16 * n;
    const int64_t left = rows.count - 16 * n;
    for (int p = 0; p < rows.vectors; ++p) {
        const float* const x = rows.x + rows.vec[p];
        float* const to = rows.gathered + (n * matrix_vectors + p) * matrix_floats;
        for (int i = 0; i < 16; ++i) store(to + i * L, i < left ? load(x + off[i]) : V{});
    }
}

void gather_matrices(const MatrixRows& rows) {
    for (int n = 0; !rows.step && n < rows.matrices; ++n) gather_matrix(rows, n);
}

// The end of sums [matrices of filters][P].
template <bool integers, int P>
void finish_matrices(const float (*sums)[matrix_floats], int filters, TileCall call) {
    for (int k = 0; k < filters; ++k, ++call.y_plane, ++call.add_plane, ++call.bias) {
        V sum[1][P];
        UNROLLED(p, P) sum[0][p] = load(sums[k / 16 * P + p] + k % 16 * L);
        if constexpr (integers) {
            M whole[1][P];
            UNROLLED(p, P) whole[0][p] = (M)sum[0][p] + *call.start;
            call.mask ? finish_integers<1, P, true>(whole, call) : finish_integers<1, P, false>(whole, call);
            ++call.start, ++call.multiplier;
        } else {
            call.mask ? finish<1, P, true>(sum, call) : finish<1, P, false>(sum, call);
        }
    }
}

// F matrices of filters, P vectors.
template <bool integers, int F, int P>
void matrix(const MatrixCall& call) {
    const MatrixRows& rows = call.rows;
    const int count = rows.matrices;
    const int64_t pitch = rows.step ? rows.step * int64_t(sizeof(float)) : 64;
    const int64_t second = rows.step ? rows.vec[P - 1] - rows.vec[0] : matrix_floats;
    const float* w = call.tile.w;
    int other = call.first_next;
    clear_matrix<0>(), clear_matrix<1>(), clear_matrix<2>(), clear_matrix<3>();
    for (int n = 0; n < count; ++n, w += F * 256) {
        const float* const b = rows.step ? rows.x + rows.off[rows.height * n] + rows.vec[0]
                                         : rows.gathered + n * matrix_vectors * matrix_floats;
        load_matrix<4>(w, 64);
        load_matrix<6>(b, pitch);
        multiply_matrices<integers, 0, 4, 6>();
        if constexpr (F == 2) load_matrix<5>(w + 256, 64), multiply_matrices<integers, 2, 5, 6>();
        if constexpr (P == 2) load_matrix<7>(b + second, pitch), multiply_matrices<integers, 1, 4, 7>();
        if constexpr (F == 2 && P == 2) multiply_matrices<integers, 3, 5, 7>();
        // The products and these loads and stores overlap.
        if (other < call.last_next) gather_matrix(*call.next, other++);
    }
    while (other < call.last_next) gather_matrix(*call.next, other++);
    alignas(64) float sums[F * P][matrix_floats];
    store_matrix<0>(sums[0]);
    if constexpr (P == 2) store_matrix<1>(sums[1]);
    if constexpr (F == 2) store_matrix<2>(sums[P]);
    if constexpr (F == 2 && P == 2) store_matrix<3>(sums[3]);
    TileCall end = call.tile;
    end.vec = rows.vec;
    finish_matrices<integers, P>(sums, call.filters, end);
}

template <bool integers>
void fill_matrices(WordKernels& words) {
    words.matrix[1][1] = matrix<integers, 1, 1>;
    words.matrix[1][2] = matrix<integers, 1, 2>;
    words.matrix[2][1] = matrix<integers, 2, 1>;
    words.matrix[2][2] = matrix<integers, 2, 2>;
}

} // namespace
} // namespace dsp
