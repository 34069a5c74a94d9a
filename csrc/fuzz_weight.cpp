// What works on weights: patterns and their thresholds, the largest magnitudes, positions of stored weights; and
// blocks.
#include <functional>

#include "block.h"
#include "convolution.h"
#include "fuzz.h"
#include "positions.h"

namespace sparse_ft {
namespace fuzz {

void fuzz_rows(Bytes& in) {
    const int64_t rows = in.small(0, 6), nnz = in.small(0, 12), cols = in.number(0, 9);
    Ints row_ptr(rows + 1, false), col(nnz, false);
    for (int64_t i = 0; i <= rows; ++i) row_ptr[i] = in.byte() % 8 ? int32_t(in.small(0, nnz)) : int32_t(in.word());
    for (int64_t i = 0; i < nnz; ++i) col[i] = in.byte() % 8 ? int32_t(in.small(0, 9)) : int32_t(in.word());
    const bool valid = validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) == nullptr;
    if (fingerprint(col.get(), nnz) != fingerprint(col.get(), nnz)) fail("a fingerprint changes");
    if (!valid) return;
    int64_t entries = 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j, ++entries)
            if (col[j] < 0 || col[j] >= cols) fail("a column out of range is accepted");
    if (entries != nnz) fail("a pattern with entries in no row is accepted");
}

// The entries of a dense weight that reach a threshold; and those that are not zero, which is a threshold of nothing.
void fuzz_rows_above(Bytes& in, const Kernels& kernels, bool guarded) {
    const int64_t rows = in.small(0, 40), taps = in.small(1, 9), cols = in.small(0, 20) * taps;
    const int threads = int(in.small(1, 3));
    const uint32_t seed = in.word();
    const uint8_t how = in.byte();
    Floats weight(product_of({rows, cols}), guarded);
    fill(weight, seed);
    if (how & 1) spoil(weight.get(), weight.size(), seed);
    std::minstd_rand random(seed + 1);
    for (int64_t i = 0; i < weight.size(); ++i)
        if (random() % 256 > how) weight[i] = 0;
    float threshold = float(in.byte()) / 100;
    if (how & 2) spoil(&threshold, 1, in.word());
    Buffer<uint8_t> chosen(taps, guarded);
    for (int64_t i = 0; i < taps; ++i) chosen[i] = in.byte() % 3;
    const RowsAbove q{weight.get(), rows, cols, threshold, how & 4 ? chosen.get() : nullptr, taps, threads};
    std::snprintf(described, sizeof described, "%s rows above %g: %ld x %ld, %ld taps, threads %d", kernels.name,
                  double(threshold), long(rows), long(cols), long(taps), threads);
    // Of the columns that are left out, one NaN may count all the same (rows_above.cpp).
    const int32_t least = std::max(1, magnitude_bits(threshold));
    std::vector<int32_t> expected_col, expected_ptr{0};
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t k = 0; k < cols; ++k) {
            const int32_t bits = magnitude_bits(weight[r * cols + k]);
            if (bits >= (q.taps && !q.taps[k % taps] ? INT32_MAX : least)) expected_col.push_back(int32_t(k));
        }
        expected_ptr.push_back(int32_t(expected_col.size()));
    }
    Ints row_ptr(rows + 1, guarded);
    const int64_t nnz = kernels.count_rows_above(q, row_ptr.get());
    if (nnz != int64_t(expected_col.size()) || !std::equal(expected_ptr.begin(), expected_ptr.end(), row_ptr.get()))
        fail("entries above a threshold are miscounted");
    Ints col(nnz, guarded);
    Floats values(nnz, guarded);
    kernels.fill_rows_above(q, row_ptr.get(), col.get(), values.get());
    if (!std::equal(expected_col.begin(), expected_col.end(), col.get())) fail("entries above a threshold differ");
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j)
            if (std::memcmp(&values[j], &weight[r * cols + col[j]], sizeof(float)) != 0)
                fail("values above a threshold differ");

    const int64_t there = count_nonzero(weight.get(), weight.size(), threads);
    Ints all_ptr(rows + 1, guarded), all_col(there, guarded);
    Floats all_values(there, guarded);
    build_rows(weight.get(), nullptr, rows, cols, all_ptr.get(), all_col.get(), how & 8 ? all_values.get() : nullptr,
               threads);
    if (validate_rows(all_ptr.get(), rows, all_col.get(), there, cols) != nullptr)
        fail("a built pattern is malformed");
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = all_ptr[r]; j < all_ptr[r + 1]; ++j) {
            const float& entry = weight[r * cols + all_col[j]];
            if (entry == 0 || (how & 8 && std::memcmp(&all_values[j], &entry, sizeof entry) != 0))
                fail("a built pattern is not where the weight is not zero");
        }
}

void fuzz_selection(Bytes& in) {
    constexpr int64_t kMost = 70000;  // from 65,536 on, a sample is drawn first
    const uint8_t how = in.byte();
    const int64_t count = how % 16 == 0 ? 65000 + in.word() % (kMost - 65000) : in.word() % 3000;
    const uint32_t seed = in.word();
    const int threads = int(in.small(1, 3));
    Buffer<float, kMost> x(count, false);
    Buffer<uint8_t, kMost> mask(count, false);
    std::minstd_rand random(seed + 1);
    for (int64_t i = 0; i < count; ++i) x[i] = float(int(random() % (how & 16 ? 10 : 65536)) - 5) / 128;
    if (how & 32) spoil(x.get(), count, seed);
    std::vector<int32_t> order;
    for (int64_t i = 0; i < count; ++i) order.push_back(magnitude_bits(x[i]));
    std::sort(order.begin(), order.end(), std::greater<>());
    std::snprintf(described, sizeof described, "selection of %ld, seed %u, how %d, threads %d", long(count), seed, how,
                  threads);
    if (count > 0) {
        const int64_t n = int64_t(in.word() % uint32_t(count));
        if (magnitude_bits(nth_magnitude(x.get(), count, n, threads)) != order[size_t(n)])
            fail("the n-th magnitude is another");
    }
    const int64_t keep = in.byte() % 8 ? int64_t(in.word() % uint32_t(count + 1)) : in.number(0, 9);
    mask_largest(x.get(), count, keep, mask.get(), threads);
    const int64_t kept = std::clamp<int64_t>(keep, 0, count);
    const int32_t least = kept > 0 ? order[size_t(kept - 1)] : INT32_MAX;
    int64_t equal = kept - std::count_if(order.begin(), order.begin() + kept, [&](int32_t b) { return b > least; });
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = magnitude_bits(x[i]);
        const bool expected = kept > 0 && (bits > least || (bits == least && equal-- > 0));
        if (mask[i] != uint8_t(expected)) fail("the largest magnitudes are others");
    }
}

// The bits of a gap code one by one, as docs/format.md says; false where it calls the code wrong.
static bool read_gaps(const Buffer<uint8_t>& code, int64_t count, int64_t numel, std::vector<int64_t>* positions) {
    if (code.size() == 0 || code[0] > 16 || code[code.size() - 1] == 0) return false;
    auto bit = [&](int64_t i) { return int64_t(code[1 + i / 8] >> i % 8 & 1); };
    const int64_t bits = 8 * (code.size() - 1);
    int64_t position = -1, zeros = 0, last = -1;
    for (int64_t i = (count * code[0] + 7) / 8 * 8; i < bits; ++i) {
        if (bit(i) == 0) {
            ++zeros;
            continue;
        }
        if (int64_t(positions->size()) == count) return false;
        int64_t remainder = 0;
        for (int64_t k = 0; k < code[0]; ++k) remainder |= bit(int64_t(positions->size()) * code[0] + k) << k;
        position += (zeros << code[0]) + remainder + 1;
        positions->push_back(position);
        zeros = 0;
        last = i;
    }
    return count > 0 && int64_t(positions->size()) == count && position < numel && last / 8 == bits / 8 - 1;
}

void fuzz_positions(Bytes& in) {
    const bool gaps = in.byte() % 2;
    const int64_t numel = in.small(0, 250) * in.small(1, 20);
    Buffer<uint8_t> code(gaps ? in.small(0, 90) : (numel + 7) / 8, false);
    for (int64_t i = 0; i < code.size(); ++i) code[i] = in.byte();
    if (gaps && code.size() > 0 && code[0] > 200) code[0] = uint8_t(code[0] % 20);
    std::vector<int64_t> expected;
    bool right;
    int64_t count = in.number(0, 60);
    if (gaps) {
        // Mostly as many as there are ones after the remainders: most codes of another number are refused at once.
        for (int64_t i = 0; in.byte() % 8 != 0 && i < 60; ++i) {
            expected.clear();
            if (read_gaps(code, i, numel, &expected)) count = i;
            if (count == i) break;
        }
        expected.clear();
        if (count < 0 || count > kMostFloats) throw TooLarge();
        right = read_gaps(code, count, numel, &expected) && count <= numel;
    } else {
        for (int64_t i = 0; i < 8 * code.size(); ++i)
            if (code[i / 8] >> i % 8 & 1) expected.push_back(i);
        if (in.byte() % 8 != 0) count = int64_t(expected.size());
        right = int64_t(expected.size()) == count && (expected.empty() || expected.back() < numel);
    }
    Ints positions(count, false);
    const char* problem = gaps ? decode_gaps(code.get(), code.size(), count, numel, positions.get())
                               : decode_bitmap(code.get(), numel, count, positions.get());
    if ((problem == nullptr) != right) fail("positions are judged other than the format says");
    if (right && !std::equal(expected.begin(), expected.end(), positions.get())) fail("positions differ");
    Floats values(count, false), dense(numel, false);
    fill(values, 1);
    if (in.byte() % 4 == 0 && count > 0) positions[in.word() % count] = int32_t(in.word());
    const bool inside = std::all_of(positions.get(), positions.get() + count,
                                    [&](int32_t position) { return position >= 0 && position < numel; });
    if ((scatter(positions.get(), count, 4, values.get(), numel, dense.get()) >= 0) != inside)
        fail("a position beyond the end is judged wrongly");
    Buffer<uint16_t> narrow_values(count, false), narrow(numel, false);
    if (scatter(positions.get(), count, 2, narrow_values.get(), numel, narrow.get()) != (inside ? count : -1))
        fail("zeros are miscounted");

    // The same at once, beside a weight of nothing.
    Floats whole(numel, false), other(numel, false);
    StoredWeight weights[] = {
        {code.get(), code.size(), gaps, values.get(), count, 4, whole.get(), numel, 0, nullptr},
        {code.get(), code.size(), gaps, narrow_values.get(), count, 2, narrow.get(), numel, 0, nullptr},
        {code.get(), in.small(0, code.size()), in.byte() % 2 == 0, values.get(), count, 4, other.get(), numel, 0,
         nullptr}};
    unpack(weights, 3, int(in.small(1, 3)));
    if ((weights[0].problem == nullptr) != right || (weights[1].problem == nullptr) != right)
        fail("a stored weight is judged other than the format says");
    std::vector<float> expected_weight(size_t(numel), 0.0f);
    for (size_t i = 0; right && i < expected.size(); ++i) expected_weight[size_t(expected[i])] = values[int64_t(i)];
    if (!std::equal(expected_weight.begin(), expected_weight.end(), whole.get())) fail("a stored weight differs");
}

void fuzz_block(Bytes& in) {
    const Element element = element_of(int(in.small(0, 1)));
    std::vector<int64_t> shape;
    bool refused = false;
    unsigned __int128 bytes = uint64_t(element_bytes(element));
    for (int64_t i = in.small(0, 6); i > 0; --i) {
        shape.push_back(in.number(0, 12));
        refused |= shape.back() < 0;
        if (refused) continue;
        bytes *= uint64_t(shape.back());
        refused |= bytes > UINT64_MAX;
    }
    if (!refused && bytes > UINT64_MAX - 64) refused = true;
    if (!refused && bytes > 4 * kMostFloats) throw TooLarge();  // the system's answer, not ours
    const std::vector<int64_t> strides(shape.size(), 1);
    DLManagedTensorVersioned* block = make_block(element, shape, strides);
    if ((block == nullptr) != refused) fail("a block of impossible size is given, or a possible one is not");
    if (block == nullptr) return;
    if (reinterpret_cast<uintptr_t>(block->tensor.data) % 64 != 0) fail("a block lies across cache lines");
    if (block->tensor.dimensions != int32_t(shape.size()) ||
        !std::equal(shape.begin(), shape.end(), block->tensor.shape) ||
        !std::equal(strides.begin(), strides.end(), block->tensor.strides))
        fail("a block is of another shape");
    std::memset(block->tensor.data, 255, size_t(bytes));
    block->deleter(block);
}

}  // namespace fuzz
}  // namespace sparse_ft
