// Activations that a norm applies on its way out: values, and gradients by way of the pre-activation `v`.
// Where the slope follows from the output alone (kFromOutput), `grad` may be given that instead of v.
#pragma once
#include "api.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// e^v to about one unit in the last place; infinity and zero where float ends, NaN of NaN.
inline vec exponential(vec v) {
    const vec round = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves an integer in the low bits
    v = v > 89.0f ? splat(89.0f) : (v < -104.0f ? splat(-104.0f) : v);
    const vec shifted = v * 1.44269504f + round;
    const ivec n = reinterpret_cast<ivec>(shifted) - reinterpret_cast<ivec>(round);
    const vec whole = shifted - round;
    const vec r = (v - whole * 0.693359375f) + whole * 2.12194440e-4f;  // v - n ln 2, |r| <= ln 2 / 2
    vec series = splat(1.0f / 5040);
    series = series * r + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = (series * r) * r + r + 1.0f;
    const ivec half = n >> 1;  // 2^n in two factors: n reaches beyond the range of an exponent
    const ivec one = (half + 127) << 23, other = (n - half + 127) << 23;
    return series * reinterpret_cast<vec>(one) * reinterpret_cast<vec>(other);
}

inline vec sigmoid(vec v) { return 1.0f / (1.0f + exponential(-v)); }

struct Identity {
    static constexpr bool kFromOutput = true;
    static constexpr bool kCostly = false;
    static vec value(vec v) { return v; }
    static vec grad(vec g, vec) { return g; }
};

struct Relu {
    static constexpr bool kFromOutput = true;
    static constexpr bool kCostly = false;
    static vec value(vec v) { return v < 0.0f ? vec{} : v; }  // NaN stays
    static vec grad(vec g, vec v) { return v <= 0.0f ? vec{} : g; }
};

struct Relu6 {
    static constexpr bool kFromOutput = true;
    static constexpr bool kCostly = false;
    static vec value(vec v) {
        v = v < 0.0f ? vec{} : v;
        return v > 6.0f ? splat(6.0f) : v;
    }
    static vec grad(vec g, vec v) {
        g = v <= 0.0f ? vec{} : g;
        return v >= 6.0f ? vec{} : g;
    }
};

struct Hardswish {
    static constexpr bool kFromOutput = false;
    static constexpr bool kCostly = false;
    static vec value(vec v) {
        vec gate = v + 3.0f;
        gate = gate < 0.0f ? vec{} : gate;
        gate = gate > 6.0f ? splat(6.0f) : gate;
        return v * (gate * (1.0f / 6));  // in this order without overflow
    }
    static vec grad(vec g, vec v) {
        const vec inner = g * (v * (1.0f / 3) + 0.5f);
        const vec lower = v <= -3.0f ? vec{} : inner;
        return v >= 3.0f ? g : lower;
    }
};

struct Silu {
    static constexpr bool kFromOutput = false;
    static constexpr bool kCostly = true;
    static vec value(vec v) { return v * sigmoid(v); }
    static vec grad(vec g, vec v) {
        const vec s = sigmoid(v);
        return g * (s + v * s * (1.0f - s));
    }
};

// The normal distribution function by Abramowitz and Stegun, 7.1.26 (error below 1e-7), and its density.
inline void normal(vec v, vec* below, vec* density) {
    const vec size = (v < 0.0f ? -v : v) * 0.707106781f;
    const vec bell = exponential(-size * size);
    const vec t = 1.0f / (1.0f + 0.3275911f * size);
    vec series = splat(1.061405429f);
    series = series * t - 1.453152027f;
    series = series * t + 1.421413741f;
    series = series * t - 0.284496736f;
    series = series * t + 0.254829592f;
    const vec tail = 0.5f * series * t * bell;
    *below = v < 0.0f ? tail : 1.0f - tail;
    *density = bell * 0.398942280f;
}

struct Gelu {
    static constexpr bool kFromOutput = false;
    static constexpr bool kCostly = true;
    static vec value(vec v) {
        vec below, density;
        normal(v, &below, &density);
        return v * below;
    }
    static vec grad(vec g, vec v) {
        vec below, density;
        normal(v, &below, &density);
        return g * (below + v * density);
    }
};

struct GeluTanh {  // v (1 + tanh u) / 2 = v sigmoid(2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
    static constexpr bool kFromOutput = false;
    static constexpr bool kCostly = true;
    static vec value(vec v) { return v * sigmoid(1.59576912f * v * (1.0f + 0.044715f * v * v)); }
    static vec grad(vec g, vec v) {
        v = v > 16.0f ? splat(16.0f) : (v < -16.0f ? splat(-16.0f) : v);  // constant beyond; v^2 must not overflow
        const vec s = sigmoid(1.59576912f * v * (1.0f + 0.044715f * v * v));
        return g * (s + v * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * v * v));
    }
};

// Calls body with the activation's type.
template <class Body>
void with_activation(Activation activation, const Body& body) {
    switch (activation) {
        case Activation::kIdentity:
            return body(Identity{});
        case Activation::kRelu:
            return body(Relu{});
        case Activation::kRelu6:
            return body(Relu6{});
        case Activation::kSilu:
            return body(Silu{});
        case Activation::kHardswish:
            return body(Hardswish{});
        case Activation::kGelu:
            return body(Gelu{});
        case Activation::kGeluTanh:
            return body(GeluTanh{});
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
