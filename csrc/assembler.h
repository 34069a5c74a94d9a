// A tiny assembler: the dozen AVX-512 and x86-64 instructions that generated kernels consist of.
// Encodings: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace sparse_ft {

// General registers by number, as the System V calling convention hands out arguments.
enum Register { rax = 0, rcx = 1, rdx = 2, rbx = 3, rsp = 4, rbp = 5, rsi = 6, rdi = 7, r8, r9, r10, r11, r12, r13 };

class Assembler {
  public:
    static constexpr size_t kLongest = 12;  // bytes of an instruction below

    // Room for so many more instructions: to be asked for before they are written.
    void reserve(size_t instructions) {
        const size_t used = size_t(size()), needed = used + instructions * kLongest;
        if (needed <= code_.size()) return;
        code_.resize(std::max(needed, 2 * code_.size()));
        at_ = code_.data() + used;
    }
    const uint8_t* data() const { return code_.data(); }
    int64_t size() const { return code_.empty() ? 0 : at_ - code_.data(); }

    // ---- vectors z0..z31; addresses are [base + disp] ------------------------------------------
    void load(int z, Register base, int32_t disp) { vector_memory(k0F, kNone, 0x10, z, 0, base, disp, 64); }
    void store(int z, Register base, int32_t disp) { vector_memory(k0F, kNone, 0x11, z, 0, base, disp, 64); }
    void broadcast(int z, Register base, int32_t disp) { vector_memory(k0F38, k66, 0x18, z, 0, base, disp, 4); }
    void zero(int z) { vector_register(k0F, k66, 0xEF, z, z, z); }
    void add(int z, int a, int b) { vector_register(k0F, kNone, 0x58, z, a, b); }
    void add(int z, int a, Register base, int32_t disp) { vector_memory(k0F, kNone, 0x58, z, a, base, disp, 64); }
    // z += a * (the float at [base + disp], in every lane)
    void fma_broadcast(int z, int a, Register base, int32_t disp) {
        vector_memory(k0F38, k66, 0xB8, z, a, base, disp, 4, kBroadcast);
    }
    void multiply_broadcast(int z, int a, Register base, int32_t disp) {  // z = a * the same
        vector_memory(k0F, kNone, 0x59, z, a, base, disp, 4, kBroadcast);
    }
    // z += a * [base + disp] in the lanes of k1; the other lanes keep their value, whatever memory holds
    void fma_masked(int z, int a, Register base, int32_t disp) {
        vector_memory(k0F38, k66, 0xB8, z, a, base, disp, 64, kMask1);
    }
    // Shuffles of a and b within 128-bit quarters (floats, then pairs of floats), then of whole quarters.
    void unpack_low(int z, int a, int b) { vector_register(k0F, kNone, 0x14, z, a, b); }
    void unpack_high(int z, int a, int b) { vector_register(k0F, kNone, 0x15, z, a, b); }
    void unpack_low_pairs(int z, int a, int b) { vector_register(k0F, k66 | kWide, 0x14, z, a, b); }
    void unpack_high_pairs(int z, int a, int b) { vector_register(k0F, k66 | kWide, 0x15, z, a, b); }
    void shuffle_quarters(int z, int a, int b, uint8_t choice) {
        vector_register(k0F3A, k66, 0x23, z, a, b);
        byte(choice);
    }
    void mask1_from_eax() { bytes({0xC5, 0xF8, 0x92, 0xC8}); }  // kmovw k1, eax
    void end_vectors() { bytes({0xC5, 0xF8, 0x77}); }           // vzeroupper

    // ---- general registers ----------------------------------------------------------------------
    void move(Register to, Register from) { general(0x89, to, from); }
    void add(Register to, Register from) { general(0x01, to, from); }
    void add(Register to, int32_t value) {
        bytes({uint8_t(0x48 | (to >> 3)), 0x81, uint8_t(0xC0 | (to & 7))});
        word(value);
    }
    void push(Register from) { bytes({uint8_t(0x40 | (from >> 3)), uint8_t(0x50 | (from & 7))}); }
    void pop(Register to) { bytes({uint8_t(0x40 | (to >> 3)), uint8_t(0x58 | (to & 7))}); }
    // Into the second-level cache; a hint, which no address makes fail.
    void prefetch(Register base, int32_t disp) {
        bytes({uint8_t(0x40 | (base >> 3)), 0x0F, 0x18, uint8_t(0x80 | 2 << 3 | (base & 7))});
        word(disp);
    }
    void load(Register to, Register base, int32_t disp) {  // base: neither rsp nor r12
        bytes({uint8_t(0x48 | (to >> 3) << 2 | (base >> 3)), 0x8B, uint8_t(0x80 | (to & 7) << 3 | (base & 7))});
        word(disp);
    }
    void load_argument(Register to, int32_t stack) {  // stack arguments begin at rsp + 8, below what was pushed
        bytes({uint8_t(0x48 | (to >> 3) << 2), 0x8B, uint8_t(0x84 | (to & 7) << 3), 0x24});
        word(stack);
    }
    void add_argument(Register to, int32_t stack) {
        bytes({uint8_t(0x48 | (to >> 3) << 2), 0x03, uint8_t(0x84 | (to & 7) << 3), 0x24});
        word(stack);
    }
    void repeat_from(int64_t top, Register counter) {  // if (--counter) goto top
        bytes({uint8_t(0x48 | (counter >> 3)), 0xFF, uint8_t(0xC8 | (counter & 7)), 0x0F, 0x85});
        word(int32_t(top - (size() + 4)));
    }
    void call(int64_t target) {
        byte(0xE8);
        word(int32_t(target - (size() + 4)));
    }
    void ret() { byte(0xC3); }

  private:
    enum Map { k0F = 1, k0F38 = 2, k0F3A = 3 };
    enum Prefix { kNone = 0, k66 = 1, kWide = 0x80 };
    enum Option { kPlain = 0, kMask1 = 1, kBroadcast = 0x10 };

    std::vector<uint8_t> code_;
    uint8_t* at_ = nullptr;

    void byte(int value) { *at_++ = uint8_t(value); }
    template <size_t N>
    void bytes(const uint8_t (&values)[N]) {
        std::memcpy(at_, values, N);
        at_ += N;
    }
    void word(int32_t value) {
        std::memcpy(at_, &value, 4);
        at_ += 4;
    }
    void general(int op, Register to, Register from) {
        bytes({uint8_t(0x48 | (from >> 3) << 2 | (to >> 3)), uint8_t(op), uint8_t(0xC0 | (from & 7) << 3 | (to & 7))});
    }
    // EVEX: register numbers are stored inverted; a displacement that is a multiple of `unit` takes one byte.
    void vector_memory(int map, int prefix, int op, int z, int a, Register base, int32_t disp, int unit,
                       int option = kPlain) {
        bytes({0x62, uint8_t((~z >> 3 & 1) << 7 | 1 << 6 | (~base >> 3 & 1) << 5 | (~z >> 4 & 1) << 4 | map),
               uint8_t((~a & 15) << 3 | 4 | prefix), uint8_t(2 << 5 | (~a >> 4 & 1) << 3 | option), uint8_t(op)});
        const bool near = disp % unit == 0 && disp / unit >= -128 && disp / unit < 128;
        byte((near ? 0x40 : 0x80) | (z & 7) << 3 | (base & 7));  // no base here has rsp's or r12's low bits
        if (near)
            byte(disp / unit);
        else
            word(disp);
    }
    void vector_register(int map, int prefix, int op, int z, int a, int b) {
        bytes({0x62, uint8_t((~z >> 3 & 1) << 7 | (~b >> 4 & 1) << 6 | (~b >> 3 & 1) << 5 | (~z >> 4 & 1) << 4 | map),
               uint8_t((~a & 15) << 3 | 4 | prefix), uint8_t(2 << 5 | (~a >> 4 & 1) << 3), uint8_t(op),
               uint8_t(0xC0 | (z & 7) << 3 | (b & 7))});
    }
};

}  // namespace sparse_ft
