// Fuzzing of the whole surface of the native core (api.h, convolution.h, block.h) under AddressSanitizer and UBSan;
// see `make fuzz`. Bytes become a call: numbers of a geometry, a pattern that is valid or has entries replaced,
// layouts, buffers of exactly the size that sizes and strides say. What must hold is said with each subject (fuzz.h),
// above all that it computes what plain loops compute, on every instruction set. Left out are roofs.cpp, which only
// measures, and bindings.cpp, where addresses come from tensors. Generated code is not instrumented: its buffers lie
// against pages that cannot be touched.
//
// The driver below is a small coverage-guided mutator for GCC (-fsanitize-coverage=trace-pc).
#include "fuzz.h"

#include <sanitizer/common_interface_defs.h>

#include <chrono>
#include <fstream>
#include <stdexcept>
#include <string>

#include "dispatch.h"

using namespace sparse_ft;
using namespace sparse_ft::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<const Kernels*> all = available_kernels();
    Bytes in{data, size};
    const uint8_t op = in.byte();
    const Kernels& kernels = *all[in.byte() % all.size()];
    const bool guarded = std::strstr(kernels.name, "jit") != nullptr;
    try {
        switch (op % 18) {
            case 17:
                fuzz_norm_pool(in, kernels);
                break;
            case 5:
                fuzz_norm_depthwise(in, kernels, guarded);
                break;
            case 6:
                fuzz_block(in);
                break;
            case 7:
                fuzz_rows(in);
                break;
            case 8:
                fuzz_norm(in, kernels);
                break;
            case 9:
                fuzz_pool(in, kernels);
                break;
            case 10:
                fuzz_transpose(in, kernels, guarded);
                break;
            case 11:
                fuzz_positions(in);
                break;
            case 12:
                fuzz_rows_above(in, kernels, guarded);
                break;
            case 13:
                fuzz_selection(in);
                break;
            case 14:
            case 15:
                fuzz_compact(in, kernels, guarded);
                break;
            case 16:
                fuzz_dropout(in, kernels, guarded);
                break;
            default:
                fuzz_product(in, kernels, guarded);
        }
    } catch (const TooLarge&) {
    } catch (const std::invalid_argument&) {  // the two ways in which the core refuses numbers
    } catch (const std::length_error&) {
    }
    return 0;
}

// ---- driver: mutate inputs that reached new code, until the time is up ------------------------

namespace {

constexpr size_t kPlaces = 1 << 16;
uint8_t reached[kPlaces];  // 1 each
std::vector<uint8_t> current;
std::string crash_file;

void save_current() {
    if (FILE* file = std::fopen(crash_file.c_str(), "wb")) {
        std::fwrite(current.data(), 1, current.size(), file);
        std::fclose(file);
        std::fprintf(stderr, "fuzz: the input is in %s\n", crash_file.c_str());
    }
}

void mutate(std::vector<uint8_t>& bytes, const std::vector<std::vector<uint8_t>>& corpus, std::mt19937& random) {
    for (uint32_t i = 1 + random() % 6; i > 0; --i) {
        const size_t place = bytes.empty() ? 0 : random() % bytes.size();
        switch (random() % 6) {
            case 0:
                if (!bytes.empty()) bytes[place] ^= uint8_t(1 << random() % 8);
                break;
            case 1:
                if (!bytes.empty()) bytes[place] = uint8_t(random());
                break;
            case 2:
                if (!bytes.empty()) bytes[place] = uint8_t(250 + random() % 6);
                break;
            case 3:
                bytes.insert(bytes.begin() + int64_t(place), uint8_t(random()));
                break;
            case 4:
                if (bytes.size() > 1) bytes.erase(bytes.begin() + int64_t(place));
                break;
            default: {  // the end of another
                const auto& other = corpus[random() % corpus.size()];
                const size_t from = other.empty() ? 0 : random() % other.size();
                bytes.resize(std::min(place, bytes.size()));
                bytes.insert(bytes.end(), other.begin() + int64_t(from), other.end());
            }
        }
    }
    if (bytes.size() > 512) bytes.resize(512);
}

}  // namespace

extern "C" const char* __asan_default_options() { return "handle_abort=1:handle_sigfpe=1:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

extern "C" __attribute__((no_sanitize("address", "undefined"), no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
    const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    reached[(place >> 1 ^ place >> 17) % kPlaces] = 1;
}

// How many places were reached for the first time. Checked, this loop would take as long as a case.
__attribute__((no_sanitize("address", "undefined"))) static size_t note_reached(uint8_t* seen) {
    size_t fresh = 0;
    for (size_t i = 0; i < kPlaces; i += 8) {
        uint64_t now, before;
        __builtin_memcpy(&now, reached + i, 8);
        __builtin_memcpy(&before, seen + i, 8);
        if ((now & ~before) == 0) continue;
        fresh += size_t(__builtin_popcountll(now & ~before));
        before |= now;
        __builtin_memcpy(seen + i, &before, 8);
    }
    return fresh;
}

int main(int argc, char** argv) {
    if (argc != 4 && argc != 3) {
        std::fprintf(stderr, "usage: fuzz SECONDS CRASH_FILE [SEED]  |  fuzz replay FILE\n");
        return 2;
    }
    if (std::strcmp(argv[1], "replay") == 0) {
        std::ifstream file(argv[2], std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        return LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
    const double seconds = std::atof(argv[1]);
    crash_file = argv[2];
    std::mt19937 random(argc == 4 ? uint32_t(std::atol(argv[3])) : 0);
    __sanitizer_set_death_callback(save_current);
    std::vector<std::vector<uint8_t>> corpus{{}};
    static uint8_t seen[kPlaces];
    size_t places = 0;
    uint64_t runs = 0;
    const auto start = std::chrono::steady_clock::now();
    auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    while (elapsed() < seconds) {
        if (random() % 4 == 0) {  // from nothing
            current.resize(16 + random() % 100);
            for (uint8_t& byte : current) byte = uint8_t(random());
        } else {
            current = corpus[random() % corpus.size()];
            mutate(current, corpus, random);
        }
        std::memset(reached, 0, sizeof reached);
        LLVMFuzzerTestOneInput(current.data(), current.size());
        ++runs;
        const size_t fresh = note_reached(seen);
        places += fresh;
        if (fresh > 0) corpus.push_back(current);
    }
    std::printf("%llu calls in %.0f s, %zu places in the code, %zu inputs kept\n",
                static_cast<unsigned long long>(runs), elapsed(), places, corpus.size());
    return 0;
}
