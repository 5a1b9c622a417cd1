// The table of kernels of one instruction set.
//
// Every buffer is planar, zero-padded and has I images interleaved innermost: [C][H + pads][pitch][I].
// A "vector" is `lanes` consecutive floats of a plane, given by its displacement from the plane's first pixel.
#pragma once

#include <cstdint>

namespace dsp {

// An enum, and its enumerators' names, by which Python knows them, as one string.
#define DSP_ENUM(Name, ...)                                                                                            \
    enum class Name : int { __VA_ARGS__ };                                                                             \
    constexpr const char* Name##_names = #__VA_ARGS__;

// From sigmoid on, only masked elementwise steps use them: sigmoids do not map 0 to 0, which would corrupt the padding.
DSP_ENUM(Act, none, relu, relu6, silu, hardswish, sigmoid, hardsigmoid, gelu, gelu_tanh, tanh)

// How a step of an integer network ends (Requantize in dsp_kernels/program/steps.py): t = sum * multiplier + bias +
// add * residual is clamped, then rounded unless low and high are those of an activation between floats.
struct Ending {
    float residual, low, high;
    bool round;
};

// y[o][v] = act(bias[o] + sum_j w[j][o] * x[v + off[j]] + add[o][v]) for `filters` planes o and some vectors v.
struct TileCall {
    const float* x;           // first pixel of plane 0 of the input
    const int32_t* off;       // [count] displacement of (channel, tap) j, in floats
    int64_t count;            // length of the reduction
    const float* w;           // [count][filters]
    const float* bias;        // [filters], or null
    float* y;                 // first pixel of plane 0 of the output
    const int64_t* y_plane;   // [filters] displacement of each output plane
    const float* add;         // residual, or y itself to continue a sum, or null
    const int64_t* add_plane; // [filters] displacement of each plane of `add`
    const int32_t* vec;       // displacement of each vector
    const int32_t* mask;      // [vectors][lanes] all ones for pixels, or null: all lanes are pixels
    Act act;
    // Of an integer step; ending is null of others.
    const Ending* ending;
    const float* multiplier; // [filters]
    const int32_t* start;    // [filters] first terms of sums of words
    int32_t* sums;           // [filters][vectors][lanes] from pass to pass, unless one pass both begins and ends
    bool begins, ends;
};

// Rows of words that products of matrices read (amx.h): `height` of them and one vector make a matrix of words.
struct MatrixRows {
    const float* x;     // as in TileCall
    const int32_t* off; // [count]
    int64_t count;
    int height, matrices; // height: 16 where rows are gathered
    int32_t step;         // floats from row to row where products read them in place; 0: gathered
    const int32_t* vec;   // [vectors]
    int vectors;          // at most matrix_vectors
    float* gathered;      // [matrices][matrix_vectors][16][lanes]
};

// The sums of a TileCall for at most matrix_filters filters. Of `tile`, off, count, vec and sums are not used, and w is
// [matrices][matrices of filters][16 filters][16 words], of which the first `height` words count.
struct MatrixCall {
    TileCall tile;
    int filters;
    MatrixRows rows;           // gathered before
    const MatrixRows* next;    // of the next group or vectors
    int first_next, last_next; // range of its matrices that is gathered between this call's products
};

// Winograd's method over rows (winograd.h): a band of four output rows from six sums instead of twelve. Computes the
// sums' inputs of one channel: six combinations of six rows of x. Patches: the same over pairs of columns too, where a
// pixel's images fill vectors. Stacked: two bands in the halves of a vector, where a row fits into one half; a vector
// for each horizontal tap.
struct BandInput {
    const float* row[6]; // of x, at the first column that is read
    float* out;          // [6] sums; of patches [24]
    int64_t pitch;       // floats from one sum to the next
    int64_t vectors;
    int images;            // floats from one column of patches, or tap of stacked bands, to the next
    const int32_t* at;     // of patches: [vectors] displacement in a row
    const float* upper[6]; // of stacked bands: the rows of the second band
    int64_t copy;          // of stacked bands: floats from one tap's vector to the next in `out`
};

// The rows of a band from its sums, for `filters` planes o and adjacent vectors. In patches a vector of sums makes two
// vectors of pixels: of even and of odd columns; stacked it makes rows of two bands.
struct BandCall {
    const float* x;     // sum 0 of channel 0, at the first vector
    int64_t pitch;      // floats from one sum to the next
    const int32_t* off; // [count] displacement of (channel, horizontal tap) j; in patches of channel j
    int64_t count;
    const float* w;           // [sums][count][filters]
    const float* bias;        // [filters]
    float* y;                 // the band's first row in plane 0 of the output
    int64_t y_pitch;          // floats from row to row, of the residual too
    const int64_t* y_plane;   // [filters]
    const float* add;         // residual, or null
    const int64_t* add_plane; // [filters]
    const int32_t* at;        // [vectors] displacement of each vector in a row
    int second;               // in patches, displacement of the second vector of pixels; otherwise 0
    bool stacked;
    int rows; // of the band, or stacked from the first vector's band on, that are inside the map
    int row;                  // floats of pixels in a row
    Act act;
};

// y[v] = act(a[v] * scale + shift + b[v]), or of a product act(a[v] * b[v]), one plane. With an ending its t, where
// the sum is a[v] or the product and the multiplier is scale.
struct MapCall {
    const float* a;
    const float* b; // or null; of a product also one pixel of `period` images, repeated to fill a vector from any image
    float* y;
    const int32_t* vec;
    const int32_t* mask;
    int64_t vectors;
    Act act;
    float scale, shift;
    bool product;
    int period; // 0: b is a plane
    const Ending* ending;
};

// Of one plane, sums[image] += x[v] - center[image], or its square, or y[v] = act((x[v] - center) * scale + shift).
// Numbers of images are repeated to fill a vector from any image; sums: 32 floats.
struct NormCall {
    const float* x;
    float* y; // or null: sums
    const int32_t* vec;
    const int32_t* mask;
    int64_t vectors;
    int images;
    const float *center, *scale, *shift;
    Act act;
    bool squared;
    float* sums;
};

// y[v] = max or scaled sum over taps of x[v + off[tap]], one plane.
struct PoolCall {
    const float* x;
    const int32_t* off;
    int64_t taps;
    float* y;
    const int32_t* vec;
    const int32_t* mask;
    int64_t vectors;
    bool average;
    float scale;
    const Ending* ending; // or null
};

// y[o * y_plane + i] = act(bias[o] + sum_f x[off[f] + i] * w[f][o]) for i < images and first <= o < last;
// first is a multiple of 16. Vectors run along the outputs, because one image fills no vector.
struct LinearCall {
    const float* x;
    const int32_t* off;
    int64_t count;
    int images;
    const float* w;    // [count][pitch]
    int64_t pitch;     // a multiple of 16
    const float* bias; // [pitch]
    float* y;
    int64_t y_plane;
    int first, last;
    Act act;
    const Ending* ending;    // or null
    const float* multiplier; // [pitch]
};

// target[r][n][i] = source[r][n * stride][i] for r < rows, n < count, i < images: one plane of a split.
struct ThinCall {
    const float* source;
    float* target;
    int64_t rows, source_pitch, target_pitch; // pitches in floats
    int64_t count, stride;
    int images;
};

// Most terms of a sum in float16 before it is added to a float sum (fp16.h). With 8, 32, 64, 128 and all terms the
// logits of ResNet-56 g=4 have a root mean square error of 0.0036, 0.0044, 0.0047, 0.0050 and 0.0054 (bfloat16: 0.022);
// 64 costs half as many conversions as 32.
constexpr int half_terms = 64;

// Most terms of an integer sum in float arithmetic, which is exact below 2^24: of products of at most 127 * 255.
constexpr int exact_terms = ((1 << 24) - 1) / (127 * 255);

constexpr int max_filters = 8; // rows of the largest microtile
constexpr int max_vectors = 8; // columns of the widest one

// Of products of matrices: two matrices of filters and two of vectors have four sums.
constexpr int matrix_filters = 32, matrix_vectors = 2;

// Convolutions over words of some channels: x and w of a TileCall are words, all else is float.
struct WordKernels {
    bool own;           // the CPU has an instruction for them
    int channels;       // of a word
    int zero;           // every byte of the word of zeros
    double add_latency; // cycles until a sum can take its next term
    void (*tile[max_filters + 1][max_vectors + 1])(const TileCall&);
    // target[n][i] = planes[c][n * stride][i] of all channels c as one word; but for the first, a plane may be null.
    void (*pack)(const float* const* planes, float* target, int64_t count, int64_t stride, int images);
    double product; // time of its instruction, where that of a float multiply-add is 1
    void (*matrix[matrix_filters / 16 + 1][matrix_vectors + 1])(const MatrixCall&); // by matrices of filters, vectors
};
constexpr int max_word = 4; // channels

struct MatrixKernels {
    double price; // factor of their estimated time; 0: there are none. Tests lower it.
    void (*begin)(int height); // a thread calls it before products of rows of another height,
    void (*end)();             // and this one after all
    void (*gather)(const MatrixRows&);
};

struct Kernels {
    int lanes;
    int filters;                  // most filters of a tile
    int vectors[max_filters + 1]; // vectors[k]: most vectors of a tile with k filters
    void (*tile[max_filters + 1][max_vectors + 1])(const TileCall&);
    WordKernels bf16; // bf16.h
    WordKernels fp16; // fp16.h; empty without AVX512-FP16
    WordKernels quads[2]; // int8.h, of bytes without and with sign; empty without AVX512-VNNI
    MatrixKernels matrices; // amx.h; empty without AMX
    void (*band_input[3])(const BandInput&); // of bands, of patches, of stacked bands
    void (*band_tile[max_filters + 1][max_vectors + 1])(const BandCall&);
    void (*map)(const MapCall&);
    void (*norm)(const NormCall&);
    void (*pool)(const PoolCall&);
    void (*linear)(const LinearCall&);
    void (*thin)(const ThinCall&);
};

const Kernels& kernels_base();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_vnni(); // if the compiler supports it, as the next three
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_avx512_fp16();
const Kernels& kernels_avx512_amx();
#endif

} // namespace dsp
