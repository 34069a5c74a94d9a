// Nothing is read or written beyond the sizes given, whatever the bytes are.
#include "positions.h"

#include <climits>
#include <cstring>
#include <memory>
#include <new>

namespace sparse_ft {
namespace {

constexpr int kMaxRemainder = 16;

// Up to eight bytes as a little-endian number; those beyond the end are zero.
uint64_t word_at(const uint8_t* data, int64_t size, int64_t at) {
    uint64_t word = 0;
    if (size - at >= 8) {
        std::memcpy(&word, data + at, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
        word = __builtin_bswap64(word);
#endif
        return word;
    }
    for (int64_t i = 0; at + i < size; ++i) word |= uint64_t(data[at + i]) << 8 * i;
    return word;
}

}  // namespace

const char* decode_gaps(const uint8_t* code, int64_t size, int64_t count, int64_t numel, int32_t* positions) {
    if (count < 1 || count > numel || numel > INT32_MAX) return "the number of gaps does not fit the weight";
    if (size < 1 || code[0] > kMaxRemainder)
        return "the code of its gaps does not begin with a number of bits from 0 to 16";
    const int width = code[0];
    const int64_t split = 1 + (count * width + 7) / 8;  // remainders before it, quotients after it
    const int64_t shortest = (count + 7) / 8, longest = (count + (numel >> width) + 7) / 8;
    if (size < split + shortest || size > split + longest || code[size - 1] == 0)
        return "the code of its gaps is longer or shorter than such a weight's";
    const uint8_t* unary = code + split;
    const uint64_t remainder_mask = (uint64_t(1) << width) - 1;
    int64_t found = 0, position = -1, last_one = -1;
    for (int64_t at = 0; at < size - split; at += 8) {
        uint64_t word = word_at(unary, size - split, at);
        if (__builtin_popcountll(word) > count - found) return "the code of its gaps holds more gaps than values";
        for (; word != 0; word &= word - 1, ++found) {
            const int64_t one = 8 * at + __builtin_ctzll(word), bit = found * width;
            const uint64_t remainder = word_at(code + 1, size - 1, bit / 8) >> bit % 8 & remainder_mask;
            position += ((one - last_one - 1) << width) + int64_t(remainder) + 1;
            positions[found] = int32_t(position);  // rising, so that the last tells whether all are in range
            last_one = one;
        }
        if (position >= numel) return "the code of its gaps goes beyond the last element of the weight";
    }
    return found < count ? "the code of its gaps holds fewer gaps than values" : nullptr;
}

const char* decode_bitmap(const uint8_t* bitmap, int64_t numel, int64_t count, int32_t* positions) {
    if (count < 0 || count > numel || numel > INT32_MAX) return "the number of ones does not fit the weight";
    const int64_t size = (numel + 7) / 8;
    if (numel % 8 != 0 && bitmap[size - 1] >> numel % 8 != 0)
        return "the bitmap has ones after the last element of the weight";
    int64_t found = 0;
    for (int64_t at = 0; at < size; at += 8) {
        uint64_t word = word_at(bitmap, size, at);
        if (__builtin_popcountll(word) > count - found) return "the bitmap has more ones than there are values";
        for (; word != 0; word &= word - 1) positions[found++] = int32_t(8 * at + __builtin_ctzll(word));
    }
    return found < count ? "the bitmap has fewer ones than there are values" : nullptr;
}

namespace {

template <class Item>
int64_t scatter_items(const int32_t* positions, int64_t count, const void* values, int64_t numel, void* dense) {
    const Item* from = static_cast<const Item*>(values);
    Item* to = static_cast<Item*>(dense);
    int64_t zeros = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (uint32_t(positions[i]) >= uint64_t(numel)) return -1;
        to[positions[i]] = from[i];
        zeros += Item(from[i] << 1) == 0;  // whatever the sign
    }
    return zeros;
}

}  // namespace

int64_t scatter(const int32_t* positions, int64_t count, int64_t item_size, const void* values, int64_t numel,
                void* dense) {
    const auto items = item_size == 4 ? scatter_items<uint32_t> : scatter_items<uint16_t>;
    return items(positions, count, values, numel, dense);
}

void unpack(StoredWeight* weights, int64_t count, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::unique_ptr<int32_t[]> positions;  // of one weight after the other; they stay in the cache
        int64_t room = 0;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            StoredWeight& w = weights[i];
            w.zeros = 0;
            if (w.count > room || !positions) {
                positions.reset(new (std::nothrow) int32_t[size_t(w.count > 0 ? w.count : 1)]);
                room = positions ? w.count : 0;
                if (!positions) {
                    w.problem = "there is no memory for its positions";
                    continue;
                }
            }
            if (w.is_gaps)
                w.problem = decode_gaps(w.code, w.code_size, w.count, w.numel, positions.get());
            else if (w.code_size != w.numel / 8 + (w.numel % 8 != 0))
                w.problem = "its bitmap is longer or shorter than such a weight's";
            else
                w.problem = decode_bitmap(w.code, w.numel, w.count, positions.get());
            if (!w.problem) w.zeros = scatter(positions.get(), w.count, w.item_size, w.values, w.numel, w.dense);
        }
    }
}

}  // namespace sparse_ft
