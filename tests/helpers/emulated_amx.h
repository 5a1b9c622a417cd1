// The functions of csrc/cpu/kernels/amx.h, emulated: the registers of a thread, and what the instructions do with them
// (Intel's manual, TDPBUSD and TDPBF16PS). Included inside namespace dsp.
#pragma once

constexpr double matrix_price = 1e-6; // so that every convolution with words is computed by matrices

[[noreturn]] inline void fault(const char* what) {
    fprintf(stderr, "AMX fault: %s\n", what);
    abort();
}

struct MatrixRegisters {
    bool configured = false;
    alignas(64) uint8_t rows[8][16][64];
    ~MatrixRegisters() {
        if (configured) fault("a thread ends without a release");
    }
    uint8_t (&of(int r))[16][64] {
        if (!configured) fault("a register is used without a configuration");
        return rows[r];
    }
};
thread_local MatrixRegisters registers;

void begin_matrices() {
    if (registers.configured) fault("configured again without a release");
    registers.configured = true;
    memset(registers.rows, 0, sizeof registers.rows);
}

void end_matrices() {
    if (!registers.configured) fault("released without a configuration");
    registers.configured = false;
    memset(registers.rows, 0xff, sizeof registers.rows);
}

template <int R>
inline void load_matrix(const float* p, int64_t pitch) {
    static_assert(R >= 0 && R < 8, "there are 8 registers");
    auto& to = registers.of(R);
    for (int row = 0; row < 16; ++row) {
        const uint8_t* const from = reinterpret_cast<const uint8_t*>(p) + row * pitch;
        if (uintptr_t(from) % 64) fault("a row crosses a cache line: right, but slow");
        memcpy(to[row], from, 64);
    }
}

template <int R>
inline void store_matrix(float* p) {
    memcpy(p, registers.of(R), 1024);
}

template <int R>
inline void clear_matrix() {
    memset(registers.of(R), 0, 1024);
}

inline void multiply_bytes(uint8_t (&c)[16][64], const uint8_t (&a)[16][64], const uint8_t (&b)[16][64]) {
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k) {
            const int8_t* const weights = reinterpret_cast<const int8_t*>(&a[m][4 * k]);
            for (int n = 0; n < 16; ++n) {
                int32_t sum;
                memcpy(&sum, &c[m][4 * n], 4);
                for (int i = 0; i < 4; ++i) sum += int32_t(weights[i]) * int32_t(b[k][4 * n + i]);
                memcpy(&c[m][4 * n], &sum, 4);
            }
        }
}

// Fused, to nearest; denormal numbers are read and written as 0. Even and odd products have sums of their own.
inline void multiply_bf16(uint8_t (&c)[16][64], const uint8_t (&a)[16][64], const uint8_t (&b)[16][64]) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0); // flush to zero, denormals are zero, no exceptions, round to nearest
    for (int m = 0; m < 16; ++m) {
        __m512 even{}, odd{};
        for (int k = 0; k < 16; ++k) {
            uint32_t weights;
            memcpy(&weights, &a[m][4 * k], 4);
            const W pair = W{} + weights, words = (W)load(reinterpret_cast<const float*>(b[k]));
            even = _mm512_fmadd_ps((__m512)(pair << 16), (__m512)(words << 16), even);
            odd = _mm512_fmadd_ps((__m512)(pair & upper_half), (__m512)(words & upper_half), odd);
        }
        float* const sums = reinterpret_cast<float*>(c[m]);
        store(sums, (V)_mm512_add_ps((__m512)load(sums), _mm512_add_ps(even, odd)));
    }
    _mm_setcsr(before);
}

template <bool integers, int C, int A, int B>
inline void multiply_matrices() {
    static_assert(C != A && C != B && A != B, "the registers of a product differ");
    (integers ? multiply_bytes : multiply_bf16)(registers.of(C), registers.of(A), registers.of(B));
}
