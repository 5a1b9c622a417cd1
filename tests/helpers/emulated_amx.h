// The functions of csrc/cpu/kernels/amx.h, emulated: the registers of a thread, and what the instructions do with them
// (Intel's manual, TDPBUSD and TDPBF16PS). Included inside namespace dsp.
#pragma once

[[noreturn]] inline void fault(const char* what) {
    fprintf(stderr, "AMX fault: %s\n", what);
    abort();
}

struct Register {
    int rows, bytes; // of a row
    alignas(64) uint8_t at[16][64];
};

struct Registers {
    bool configured = false;
    Register all[8];
    ~Registers() {
        if (configured) fault("a thread ends without a release");
    }
    Register& operator[](int r) {
        if (!configured) fault("a register is used without a configuration");
        return all[r];
    }
};
thread_local Registers registers;

inline void configure(const MatrixShapes& shapes) {
    if (shapes.palette != 1 || shapes.start_row) fault("the palette or the first row");
    registers.configured = true;
    for (int r = 0; r < 8; ++r) {
        registers.all[r] = {shapes.rows[r], shapes.row_bytes[r], {}};
        if (!shapes.rows[r] || shapes.rows[r] > 16 || !shapes.row_bytes[r] || shapes.row_bytes[r] > 64)
            fault("a shape beyond the palette");
        if (shapes.rows[r + 8] || shapes.row_bytes[r + 8]) fault("a shape for no register");
    }
}

void end_matrices() { registers.configured = false; }

template <int R>
inline void load_matrix(const float* p, int64_t pitch) {
    Register& to = registers[R];
    memset(to.at, 0, sizeof to.at);
    for (int row = 0; row < to.rows; ++row) {
        const uint8_t* const from = reinterpret_cast<const uint8_t*>(p) + row * pitch;
        if (uintptr_t(from) % 64) fault("a row crosses a cache line: right, but slow");
        memcpy(to.at[row], from, size_t(to.bytes));
    }
}

template <int R>
inline void store_matrix(float* p) {
    for (int row = 0; row < registers[R].rows; ++row) memcpy(p + 16 * row, registers[R].at[row], registers[R].bytes);
}

template <int R>
inline void clear_matrix() {
    memset(registers[R].at, 0, sizeof registers[R].at);
}

inline void multiply_bytes(Register& c, const Register& a, const Register& b) {
    for (int m = 0; m < c.rows; ++m) {
        float* const sums = reinterpret_cast<float*>(c.at[m]);
        M sum = (M)load(sums);
        for (int k = 0; k < b.rows; ++k) {
            const W words = (W)load(reinterpret_cast<const float*>(b.at[k]));
            for (int i = 0; i < 4; ++i) sum += int32_t(int8_t(a.at[m][4 * k + i])) * (M)(words >> 8 * i & 0xff);
        }
        store(sums, (V)sum);
    }
}

// Fused, to nearest; denormal numbers are read and written as 0. Even and odd products have sums of their own.
inline void multiply_bf16(Register& c, const Register& a, const Register& b) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x9fc0); // flush to zero, denormals are zero, no exceptions, round to nearest
    for (int m = 0; m < c.rows; ++m) {
        __m512 even{}, odd{};
        for (int k = 0; k < b.rows; ++k) {
            uint32_t weights;
            memcpy(&weights, &a.at[m][4 * k], 4);
            const W pair = W{} + weights, words = (W)load(reinterpret_cast<const float*>(b.at[k]));
            even = _mm512_fmadd_ps((__m512)(pair << 16), (__m512)(words << 16), even);
            odd = _mm512_fmadd_ps((__m512)(pair & upper_half), (__m512)(words & upper_half), odd);
        }
        float* const sums = reinterpret_cast<float*>(c.at[m]);
        store(sums, (V)_mm512_add_ps((__m512)load(sums), _mm512_add_ps(even, odd)));
    }
    _mm_setcsr(before);
}

template <bool integers, int C, int A, int B>
inline void multiply_matrices() {
    Register &c = registers[C], &a = registers[A], &b = registers[B];
    if (C == A || C == B || A == B || c.rows != a.rows || c.bytes != b.bytes || a.bytes != 4 * b.rows)
        fault("registers or shapes that cannot be multiplied");
    (integers ? multiply_bytes : multiply_bf16)(c, a, b);
}
