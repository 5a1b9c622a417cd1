// Winograd's minimal filtering F(4, 3) over the rows of a map: the numbers of the transforms.
//
// A band of four output rows of a kernel with three rows is a product of polynomials of degree 5 in all, so six values of
// it are enough (Winograd, 1980; Lavin and Gray, arXiv 1509.09308, equation 5): six products instead of twelve, each
// with all horizontal taps. The values are taken at +-near, +-far, 0 and infinity. The points sqrt(1/2) and sqrt(2) round
// less than the usual 1 and 2: against float64, for 24 channels, root mean square errors of 1.5 instead of 2.7 times those
// of a plain sum. F(2, 3), four products instead of six, was slower than one of the other two in every case tried.
#pragma once

namespace dsp {

constexpr int band_rows = 4, band_sums = 6;

constexpr double near_point = 0.70710678118654752, far_point = 1.41421356237309505;
constexpr double square_near = 0.5, square_far = 2.0;

// Three vertical taps as the factor of one of the sums, in the order near, -near, far, -far, 0, infinity.
inline double band_weight(int sum, double top, double middle, double bottom) {
    if (sum == 4) return top;
    if (sum == 5) return bottom;
    const double square = sum < 2 ? square_near : square_far, other = sum < 2 ? square_far : square_near;
    const double point = (sum % 2 ? -1.0 : 1.0) * (sum < 2 ? near_point : far_point);
    return (top + point * middle + square * bottom) / (2.0 * square * (square - other));
}

// F(2, 3) over the columns of a band makes patches of four by two pixels: 24 products instead of 72. In the order
// 1, -1, 0, infinity of its points; its rounding errors add nothing that can be seen to those of the rows.
constexpr int patch_columns = 2, column_sums = 4, patch_sums = band_sums * column_sums;

// Three horizontal taps, each a factor of a row's sum, as the factor of one of the sums.
inline double patch_weight(int sum, double left, double middle, double right) {
    if (sum == 2) return left;
    if (sum == 3) return right;
    return 0.5 * (left + (sum == 1 ? -middle : middle) + right);
}

} // namespace dsp
