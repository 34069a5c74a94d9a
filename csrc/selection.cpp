// The k-th largest magnitude by counting: the bits of a magnitude are in the order of its value.
#include "api.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace sparse_ft {
namespace {

uint32_t magnitude_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

constexpr int kDigits[] = {20, 10, 0};  // shifts: 11, 10 and 10 bits, highest first
constexpr int kDigitBits = 11;

}  // namespace

float nth_magnitude(const float* x, int64_t count, int64_t n, int threads) {
    uint32_t prefix = 0, prefix_mask = 0;
    for (int shift : kDigits) {
        const uint32_t digit_mask = (shift == 20 ? 0x7ffu : 0x3ffu);
        std::vector<int64_t> total(size_t(1) << kDigitBits, 0);
#pragma omp parallel num_threads(threads)
        {
            // Many values are equal, zero above all: two tables, so that counts do not wait for one another.
            std::vector<int64_t> own(size_t(2) << kDigitBits, 0);
            int64_t* other = own.data() + (1 << kDigitBits);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < count / 2; ++i) {
                const uint32_t a = magnitude_bits(x[2 * i]), b = magnitude_bits(x[2 * i + 1]);
                own[a >> shift & digit_mask] += (a & prefix_mask) == prefix;
                other[b >> shift & digit_mask] += (b & prefix_mask) == prefix;
            }
#pragma omp critical
            for (size_t i = 0; i < total.size(); ++i) total[i] += own[i] + other[i];
        }
        if (count % 2) {
            const uint32_t last = magnitude_bits(x[count - 1]);
            total[last >> shift & digit_mask] += (last & prefix_mask) == prefix;
        }
        uint32_t digit = digit_mask;
        for (; digit > 0 && n >= total[digit]; --digit) n -= total[digit];
        prefix |= digit << shift;
        prefix_mask |= digit_mask << shift;
    }
    float found;
    std::memcpy(&found, &prefix, sizeof found);
    return found;
}

void mask_largest(const float* x, int64_t count, int64_t keep, uint8_t* mask, int threads) {
    if (keep <= 0 || keep >= count) {
        std::memset(mask, keep > 0, size_t(count));
        return;
    }
    const float threshold = nth_magnitude(x, count, keep - 1, threads);
    const uint32_t least = magnitude_bits(threshold);
    int64_t above = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : above)
    for (int64_t i = 0; i < count; ++i) {
        mask[i] = magnitude_bits(x[i]) > least;
        above += mask[i];
    }
    for (int64_t i = 0; above < keep; ++i)
        if (magnitude_bits(x[i]) == least) {
            mask[i] = 1;
            ++above;
        }
}

}  // namespace sparse_ft
