// What the kernels in C++ share: vectors, and products of some rows with a panel of columns.
//
// X: a number of the model, float, or uint16_t for bfloat16 (BFLOAT16), the upper half of a float.
// V: floats of a vector; NARROW keeps 8, where 16 do not divide the data.
// Y: a number that is multiplied: bfloat16, in pairs (P = 2), where the processor has instructions
// for it, else float (P = 1).

#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

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
// A step's attention takes so many positions at once, at any length: bits depend on no other row.
constexpr int CHUNK = 256;
typedef float vec __attribute__((vector_size(4 * V)));
typedef int32_t word __attribute__((vector_size(4 * V)));

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

// V of them at once.
#if BFLOAT16
typedef uint16_t half __attribute__((vector_size(2 * V)));
static inline vec numbers(const X* x) {
    return (vec)(__builtin_convertvector(load<half>(x), word) << 16);
}
static inline void store(X* x, vec y) {
    word bits = (word)y;
    half upper = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, half);
    memcpy(x, &upper, sizeof upper);
}
#else
static inline vec numbers(const X* x) { return load<vec>(x); }
static inline void store(X* x, vec y) { memcpy(x, &y, sizeof y); }
#endif

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

// The first n numbers of a vector; the others are -inf.
static inline vec only(vec x, int64_t n) {
    vec place;
    for (int i = 0; i < V; i++) place[i] = i;
    return place < float(n) ? x : vec{} - INFINITY;
}

// e^x for x <= 0: 2^n e^f, e^f by its series, to 1e-4 of it for bfloat16, else to float32's last
// digit or two; 0 below e^-87.
static inline vec exponential(vec x) {
    constexpr float magic = 3 << 22;  // x + magic - magic is x, rounded to an integer
    constexpr float series[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, .5f, 1, 1};
    vec n = x * float(M_LOG2E) + magic - magic, p = {};
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: n times it is exact
    for (int k = BFLOAT16 ? 3 : 0; k < 8; k++) p = p * f + series[k];
    p *= (vec)(__builtin_convertvector(n + 127, word) << 23);
    return x < -87 ? vec{} : p;
}

// Products of rows x, whose sums stay in registers, and a panel w: COLUMNS columns, one step of P
// numbers after another.
constexpr int ROWS = V == 16 ? 12 : 6;  // rows whose sums fill the registers
constexpr int COLUMNS = 2 * V, STEP = COLUMNS * P;

// y [M, COLUMNS] += x [M, n P] (rows K apart) times w [n, COLUMNS, P]. With each of the n steps
// `stride` numbers of what comes next are fetched.
template <int M, typename Next>
static void block(const Y* x, int64_t K, const Y* w, int n, float* y, const Next* next,
                  int stride) {
    // One row of x, with weights that need no conversion, gains nothing by it.
    constexpr bool fetched = M > 1 || !std::is_same_v<Next, Y>;
    constexpr int LINE = 64 / sizeof(Next);  // a cache line
    vec a[M], b[M];
    for (int m = 0; m < M; m++) a[m] = load<vec>(y + m * COLUMNS);
    for (int m = 0; m < M; m++) b[m] = load<vec>(y + m * COLUMNS + V);
    for (int k = 0; k < n; k++, w += STEP, next += stride) {
        vector left = load<vector>(w), right = load<vector>(w + STEP / 2);
        if (fetched) __builtin_prefetch(next);
        if (fetched && stride > LINE) __builtin_prefetch(next + LINE);
        for (int m = 0; m < M; m++) {
            vector z = all(x + m * K + k * P);
            a[m] = add(a[m], z, left), b[m] = add(b[m], z, right);
        }
    }
    for (int m = 0; m < M; m++) memcpy(y + m * COLUMNS, a + m, sizeof(vec));
    for (int m = 0; m < M; m++) memcpy(y + m * COLUMNS + V, b + m, sizeof(vec));
}

// The block of m <= M rows: for each number of rows there is a loop of its own.
template <int M, typename... Rest>
static void blocks(int m, Rest... rest) {
    if constexpr (M > 1) {
        if (m < M) return blocks<M - 1>(m, rest...);
    }
    block<M>(rest...);
}

// y [count, COLUMNS] += x [count, n P] (rows K apart) times w [n, COLUMNS, P]; meanwhile as many
// numbers are fetched from `next` on.
template <typename Next>
static void multiply(const Y* x, int64_t K, const Y* w, int n, float* y, int count,
                     const Next* next) {
    int groups = (count + ROWS - 1) / ROWS, stride = STEP / groups;
    for (int g = 0; g < groups; g++) {
        int first = g * count / groups, m = (g + 1) * count / groups - first;
        blocks<ROWS>(m, x + first * K, K, w, n, y + first * COLUMNS, next + g * n * stride, stride);
    }
}
