// x Wᵀ on a CPU: few rows x in a step, which should take what reading W once takes, many in a
// prompt.
//
// lab/linear.py compiles it for rows in float or bfloat16, and for a weight of T: X, the same, or
// int8_t with a scale for each of its rows. The weight lies in panels of COLUMNS of its rows, one k
// after another, or one pair of k's after another where the processor multiplies bfloat16 in pairs:
// it is read as it lies. DEPTH of these steps of a panel stay in the cache until up to MOST rows
// are done with them, ROWS at a time, whose sums stay in registers; meanwhile the next are fetched.
// More rows read the weight again. A sum goes from the first k to the last, however many other rows
// or threads there are.

#include <algorithm>
#include <vector>

#include "vectors.h"

constexpr int DEPTH = 16384 / (STEP * sizeof(Y));
constexpr int MOST = 96;  // rows that go through a panel together

#if PAIRS
static inline __m512 floats(const int8_t* x) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(x)));
}

// By hand: GCC makes slower code of a loop like the one below.
static void convert(const int8_t* x, int64_t n, Y* y) {
    for (int64_t i = 0; i < n; i += 32) {
        vector both = _mm512_cvtne2ps_pbh(floats(x + i + 16), floats(x + i));
        memcpy(y + i, &both, sizeof both);
    }
}
#else
template <typename From>
static void convert(const From* x, int64_t n, Y* y) {
    for (int64_t i = 0; i < n; i++) y[i] = factor(x[i]);
}
#endif

// The numbers as they are multiplied: where they are, or converted, exactly, into `room`.
template <typename From>
static const Y* converted(const From* x, int64_t n, Y* room) {
    if constexpr (std::is_same_v<From, Y>) return x;
    else convert(x, n, room);
    return room;
}

extern "C" const int columns = COLUMNS, pairs = P;

// x [B, K], w [panels of N, K / P, COLUMNS, P], scale and bias [N] or null -> y [B, N]. All threads
// of a team call it, and share the panels.
extern "C" void run(const X* x, const T* w, const X* scale, const X* bias, X* y, int64_t B,
                    int64_t K, int64_t N) {
    static thread_local std::vector<Y> room;
    room.resize(std::is_same_v<X, Y> ? 0 : std::min<int64_t>(MOST, B) * K);
    int64_t panels = (N + COLUMNS - 1) / COLUMNS;
    for (int64_t at = 0; at < B; at += MOST) {  // rows that stay in the cache for all panels
        int64_t count = std::min<int64_t>(MOST, B - at);
        const Y* rows = converted(x + at * K, count * K, room.data());
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) {
            int64_t start = p * COLUMNS, width = std::min<int64_t>(COLUMNS, N - start);
            float sums[MOST * COLUMNS];
            Y there[DEPTH * STEP];
            memset(sums, 0, count * COLUMNS * sizeof(float));
            for (int64_t k = 0; k < K; k += DEPTH * P) {
                int n = std::min<int64_t>(DEPTH, (K - k) / P);
                const T* here = w + (p * K + k) * COLUMNS;
                const Y* weights = converted(here, n * STEP, there);
                multiply(rows + k, K, weights, n, sums, count, here + n * STEP);
            }
            for (int64_t b = 0; b < count; b++)
                for (int64_t i = 0; i < width; i++) {
                    float sum = sums[b * COLUMNS + i];
                    if (scale) sum *= number(scale[start + i]);
                    if (bias) sum += number(bias[start + i]);
                    store(y + (at + b) * N + start + i, sum);
                }
        }
    }
#pragma omp barrier
}

// The same in a team of its own.
extern "C" void product(const X* x, const T* w, const X* scale, const X* bias, X* y, int64_t B,
                        int64_t K, int64_t N, int threads) {
#pragma omp parallel num_threads(threads)
    run(x, w, scale, bias, y, B, K, N);
}
