// Weights as files hold them (docs/format.md): positions decoded from strangers' bytes, values written to them.
#pragma once
#include <cstdint>

namespace sparse_ft {

// The `count` rising positions below `numel` that a gap code of `size` bytes, or a bitmap of ceil(numel / 8), holds
// (docs/format.md). Null, or what is wrong with the bytes; `positions` holds nothing of use then.
const char* decode_gaps(const uint8_t* code, int64_t size, int64_t count, int64_t numel, int32_t* positions);
const char* decode_bitmap(const uint8_t* bitmap, int64_t numel, int64_t count, int32_t* positions);
// dense[positions[i]] = values[i], of float items of 2 or 4 bytes. How many of the values are zero; -1 if a position
// is beyond the end of `dense`.
int64_t scatter(const int32_t* positions, int64_t count, int64_t item_size, const void* values, int64_t numel,
                void* dense);
// A weight as a file holds it, and the zeros that its values are written to.
struct StoredWeight {
    const uint8_t* code;
    int64_t code_size;
    bool is_gaps;  // otherwise a bitmap
    const void* values;
    int64_t count, item_size;
    void* dense;
    int64_t numel;
    int64_t zeros;        // written: how many of the values are zero
    const char* problem;  // written: null, or what is wrong with the code; `dense` is as it was then
};
void unpack(StoredWeight* weights, int64_t count, int threads);

}  // namespace sparse_ft
