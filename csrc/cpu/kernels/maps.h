// Kernels other than convolutions, included by impl.h: elementwise steps, pools, linear layers, strides.
#pragma once

namespace dsp {
namespace {

void map(const MapCall& call) {
    const Requantizer to(call.ending ? *call.ending : Ending{});
    for (int64_t i = 0; i < call.vectors; ++i) {
        const int64_t d = call.vec[i];
        V v = load(call.a + d);
        if (call.ending) {
            if (call.product) v *= load(call.b + (call.period ? d % call.period : d));
            v = to.scaled(v, V{} + call.scale, V{});
            if (call.b && !call.product) v = to.added(v, call.b + d);
            v = to.ended(v);
        } else if (call.product) {
            v *= load(call.b + (call.period ? d % call.period : d));
        } else {
            v = v * call.scale + call.shift;
            if (call.b) v += load(call.b + d);
        }
        if (!call.ending) v = activate(v, call.act);
        if (call.mask) v = keep(v, call.mask + i * L);
        store(call.y + d, v);
    }
}

void norm(const NormCall& call) {
    for (int64_t i = 0; i < call.vectors; ++i) {
        const int64_t d = call.vec[i], image = d % call.images;
        V v = load(call.x + d) - load(call.center + image);
        if (call.y)
            v = activate(v * load(call.scale + image) + load(call.shift + image), call.act);
        else if (call.squared)
            v *= v;
        if (call.mask) v = keep(v, call.mask + i * L);
        call.y ? store(call.y + d, v) : store(call.sums + image, load(call.sums + image) + v);
    }
}

void pool(const PoolCall& call) {
    const Requantizer to(call.ending ? *call.ending : Ending{});
    for (int64_t i = 0; i < call.vectors; ++i) {
        const float* x = call.x + call.vec[i];
        V v = load(x + call.off[0]);
        if (call.average) {
            for (int64_t t = 1; t < call.taps; ++t) v += load(x + call.off[t]);
            v = call.ending ? to.ended(to.scaled(v, V{} + call.scale, V{})) : v * call.scale;
        } else {
            for (int64_t t = 1; t < call.taps; ++t) {
                V u = load(x + call.off[t]);
                v = (v > u) | (v != v) ? v : u; // a NaN wins, as in PyTorch
            }
        }
        if (call.mask) v = keep(v, call.mask + i * L);
        store(call.y + call.vec[i], v);
    }
}

template <int K, int P>
void linear_tile(const LinearCall& call, int image, int first) {
    V acc[K][P];
    M sums[K][P] = {}; // of an integer step
    const Requantizer to(call.ending ? *call.ending : Ending{});
    UNROLLED(k, K) UNROLLED(p, P) acc[k][p] = call.ending ? V{} : load(call.bias + first + p * L);
    const float* w = call.w + first;
    for (int64_t f = 0; f < call.count;) {
        const int64_t end = call.ending && call.count - f > exact_terms ? f + exact_terms : call.count;
        for (; f < end; ++f, w += call.pitch) {
            const float* x = call.x + call.off[f] + image;
            V in[P];
            UNROLLED(p, P) in[p] = load(w + p * L);
            multiply_add<K, P>(acc, in, x);
        }
        if (!call.ending) break;
        for (int k = 0; k < K; ++k)
            for (int p = 0; p < P; ++p) sums[k][p] += __builtin_convertvector(acc[k][p], M), acc[k][p] = V{};
    }
    for (int k = 0; k < K; ++k)
        for (int p = 0; p < P; ++p) {
            const int at = first + p * L;
            const V v = call.ending ? to.ended(to.scaled(__builtin_convertvector(sums[k][p], V),
                                                           load(call.multiplier + at), load(call.bias + at)))
                                    : activate(acc[k][p], call.act);
            for (int l = 0; l < L && at + l < call.last; ++l)
                call.y[(at + l) * call.y_plane + image + k] = v[l];
        }
}

template <int I, int S>
void thin_rows(const ThinCall& call) {
    const int64_t step = (S ? S : call.stride) * I;
    for (int64_t r = 0; r < call.rows; ++r) {
        const float* __restrict source = call.source + r * call.source_pitch;
        float* __restrict target = call.target + r * call.target_pitch;
        for (int64_t n = 0; n < call.count; ++n)
#pragma GCC unroll 16
            for (int i = 0; i < I; ++i) target[n * I + i] = source[n * step + i];
    }
}

void thin(const ThinCall& call) {
    switch (call.images) {
    case 1: return call.stride == 2 ? thin_rows<1, 2>(call) : thin_rows<1, 0>(call);
    case 2: return call.stride == 2 ? thin_rows<2, 2>(call) : thin_rows<2, 0>(call);
    case 4: return thin_rows<4, 0>(call);
    case 8: return thin_rows<8, 0>(call);
    default: return thin_rows<16, 0>(call);
    }
}

template <int K>
void linear_rows(const LinearCall& call, int image) {
    int o = call.first;
    for (; o + 4 * L <= call.pitch && o < call.last; o += 4 * L) linear_tile<K, 4>(call, image, o);
    for (; o < call.last; o += L) linear_tile<K, 1>(call, image, o);
}

void linear(const LinearCall& call) {
    int image = 0;
    for (; image + 4 <= call.images; image += 4) linear_rows<4>(call, image);
    for (; image + 2 <= call.images; image += 2) linear_rows<2>(call, image);
    for (; image < call.images; ++image) linear_rows<1>(call, image);
}

} // namespace
} // namespace dsp
