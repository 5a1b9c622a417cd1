// Winograd's minimal filtering F(rows, 3) over the rows of a map: the numbers of the transforms.
//
// A band of m output rows of a kernel with three rows is the product of two polynomials, of degree m - 1 + 2 in all,
// so m + 2 values of it are enough (Winograd, 1980; Lavin and Gray, arXiv 1509.09308, equation 5): at 0, at infinity and
// at +-1 for m = 2; at 0, infinity, +-near and +-far for m = 4. So 4 products for 2 rows instead of 6, or 6 for 4
// instead of 12, each with all horizontal taps. The points sqrt(1/2) and sqrt(2) round less than 1 and 2: against
// float64, for 24 channels, root mean square errors of 1.5 instead of 2.7 times those of the plain sum (m = 2: 0.9).
#pragma once

namespace dsp {

constexpr float near_point = 0.70710678118654752f, far_point = 1.41421356237309505f;
constexpr float square_near = 0.5f, square_far = 2.0f;

// Three vertical taps as the factors of the sums: of the pairs of points first, then of 0 and infinity.
struct BandWeights {
    const int rows, pairs;
    explicit BandWeights(int rows) : rows(rows), pairs(rows / 2 + 1) {}
    float operator()(int sum, double top, double middle, double bottom) const {
        if (sum == rows) return float(rows == 2 ? -top : top);
        if (sum == rows + 1) return float(bottom);
        const double square = rows == 2 ? 1.0 : sum < 2 ? 0.5 : 2.0, other = 2.5 - square;
        const double point = (sum % 2 ? -1.0 : 1.0) * (rows == 2 ? 1.0 : sum < 2 ? 0.70710678118654752 : 1.41421356237309505);
        const double scale = 2.0 * square * (rows == 2 ? 1.0 : square - other);
        return float((top + point * middle + square * bottom) / scale);
    }
};

} // namespace dsp
