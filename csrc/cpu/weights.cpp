// The weights of a convolution in the order in which its microtiles read them, transformed where they are for bands.
#include "network.h"
#include "kernels/winograd.h"

namespace dsp {

namespace {

// The weights of one tile as plain sums read them: floats, or words by the kernels' own rounding.
void pack_plain(std::vector<float>& to, const Step& step, const float* first, int filters, int64_t count, int64_t taps) {
    for (int64_t c = 0; c < count; c += step.pairs ? 2 * taps : taps)
        for (int64_t j = c; j < c + taps; ++j) {
            float one[max_filters], other[max_filters];
            for (int k = 0; k < filters; ++k) {
                const float* filter = first + k * count;
                one[k] = filter[j], other[k] = j + taps < count ? filter[j + taps] : 0.0f;
            }
            if (step.pairs) step.pairs->pair(one, other, one, filters, 1, 1);
            to.insert(to.end(), one, one + filters);
        }
}

// [sum][channel][filters], in the order of patch_input().
void pack_patches(std::vector<float>& to, const float* first, int filters, int64_t count) {
    for (int sum = 0; sum < patch_sums; ++sum)
        for (int64_t c = 0; c < count; c += 9)
            for (int k = 0; k < filters; ++k) {
                const float* tap = first + k * count + c;
                double column[3];
                for (int x = 0; x < 3; ++x) column[x] = band_weight(sum / column_sums, tap[x], tap[3 + x], tap[6 + x]);
                to.push_back(float(patch_weight(sum % column_sums, column[0], column[1], column[2])));
            }
}

// [sum][channel, horizontal tap][filters], in the order of band_input().
void pack_bands(std::vector<float>& to, const float* first, int filters, int64_t count, int columns) {
    for (int sum = 0; sum < band_sums; ++sum)
        for (int64_t c = 0; c < count; c += 3 * columns)
            for (int64_t x = c; x < c + columns; ++x)
                for (int k = 0; k < filters; ++k) {
                    const float* tap = first + k * count + x;
                    to.push_back(float(band_weight(sum, tap[0], tap[columns], tap[2 * columns])));
                }
}

} // namespace

std::shared_ptr<const Packed> Network::packed(const Step& step, const Splits& splits, Form form) const {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& known = packed_[{&step, splits, form}];
    if (auto found = known.lock()) return found;
    auto made = std::make_shared<Packed>();
    for (size_t g = 0; g < step.groups.size(); ++g) {
        const GroupIndex& group = step.groups[g];
        const int64_t taps = int64_t(step.kernel[0]) * step.kernel[1], count = int64_t(group.in.size()) * taps;
        int first = 0;
        for (int filters : splits[g]) {
            FilterTile tile{int(g), filters, int64_t(made->weights.size()), int64_t(made->bias.size()), {}};
            const float* weights = group.weights.data() + first * count;
            if (form == Form::patches)
                pack_patches(made->weights, weights, filters, count);
            else if (form == Form::bands)
                pack_bands(made->weights, weights, filters, count, step.kernel[1]);
            else
                pack_plain(made->weights, step, weights, filters, count, taps);
            for (int k = 0; k < filters; ++k) {
                tile.channels.push_back(group.out[first + k]);
                made->bias.push_back(step.bias[tile.channels.back()]);
            }
            first += filters;
            made->tiles.push_back(std::move(tile));
        }
    }
    known = made;
    return made;
}

} // namespace dsp
