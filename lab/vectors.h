// Vectors of lab/attention.cpp and lab/products.cpp.
//
// X: a number of the model, float, or uint16_t for bfloat16 (BFLOAT16), the upper half of a float.
// V: floats of a vector; NARROW keeps 8, where 16 do not divide the data.
// Y: a number that is multiplied: bfloat16, in pairs (P = 2), where the processor has instructions
// for it, else float (P = 1).

#pragma once
#include <cstdint>
#include <cstring>

#if BFLOAT16
typedef uint16_t X;
#else
typedef float X;
#endif

#if __AVX512F__ && !NARROW
constexpr int V = 16;  // numbers of a vector
#else
constexpr int V = 8;
#endif
typedef float vec __attribute__((vector_size(4 * V)));

template <typename To>
static inline To load(const void* x) {
    To y;
    memcpy(&y, x, sizeof y);
    return y;
}

static inline float number(float x) { return x; }
static inline float number(int8_t x) { return x; }
static inline float number(uint16_t x) {
    uint32_t bits = x << 16;
    return load<float>(&bits);
}

static inline void store(float* x, float y) { *x = y; }
static inline void store(uint16_t* x, float y) {
    uint32_t bits = load<uint32_t>(&y);
    *x = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

// Products are of numbers Y, and P of them go into each of V sums at once.
#define PAIRS (BFLOAT16 && __AVX512BF16__ && !NARROW)
#if PAIRS
#include <immintrin.h>
constexpr int P = 2;
typedef uint16_t Y;
typedef __m512bh vector;  // [V, P]
static inline Y factor(X x) { return x; }
static inline vec add(vec sum, vector x, vector y) {
    return (vec)_mm512_dpbf16_ps((__m512)sum, x, y);
}
static inline vector all(const Y* x) { return (vector)_mm512_set1_epi32(load<int32_t>(x)); }
#else
constexpr int P = 1;
typedef float Y;
typedef vec vector;
template <typename From>
static inline Y factor(From x) { return number(x); }
static inline vec add(vec sum, vector x, vector y) { return sum + x * y; }
static inline vector all(const Y* x) { return *x - vec{}; }  // P of them, V times
#endif
