// Constants of Winograd's minimal filtering F(4, 3) over the rows of a feature map.
//
// Four output rows (a band) of a kernel with three rows are a product of polynomials of degree 5, which six evaluation
// points determine (Winograd, 1980; Lavin and Gray, arXiv 1509.09308, equation 5): six products instead of twelve, each
// with all horizontal taps. The points are +-near, +-far, 0 and infinity. sqrt(1/2) and sqrt(2) round less than the
// usual 1 and 2: against float64, for 24 channels, the root mean square error is 1.5 instead of 2.7 times that of a
// plain sum. F(2, 3), four products instead of six, was slower than one of the other two in every case tried.
#pragma once

namespace dsp {

constexpr int band_rows = 4, band_sums = 6;

constexpr double near_point = 0.70710678118654752, far_point = 1.41421356237309505;
constexpr double square_near = 0.5, square_far = 2.0;

// The factor of one sum from three vertical taps, in the order near, -near, far, -far, 0, infinity.
inline double band_weight(int sum, double top, double middle, double bottom) {
    if (sum == 4) return top;
    if (sum == 5) return bottom;
    const double square = sum < 2 ? square_near : square_far, other = sum < 2 ? square_far : square_near;
    const double point = (sum % 2 ? -1.0 : 1.0) * (sum < 2 ? near_point : far_point);
    return (top + point * middle + square * bottom) / (2.0 * square * (square - other));
}

// F(2, 3) over the columns of a band makes patches of four by two pixels: 24 products instead of 72. Its points are
// 1, -1, 0, infinity; its rounding errors are negligible beside those of the rows.
constexpr int patch_columns = 2, column_sums = 4, patch_sums = band_sums * column_sums;

// The factor of one sum from three horizontal taps, each a factor of a row's sum.
inline double patch_weight(int sum, double left, double middle, double right) {
    if (sum == 2) return left;
    if (sum == 3) return right;
    return 0.5 * (left + (sum == 1 ? -middle : middle) + right);
}

} // namespace dsp
