// x Wᵀ + b of a decoding step on a CPU: few rows x, and a weight W that should be read only once.
//
// The weight lies in panels of COLUMNS of its rows, each k by k (lab/products.py): it is read as it
// lies. DEPTH k's of a panel stay in the cache until all rows are done with them, ROWS at a
// time, whose sums stay in registers; meanwhile the next are fetched. A sum goes from the first k
// to the last: it does not depend on how many other rows or threads there are.

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int V = 16, ROWS = 12;  // numbers of a vector; rows whose sums fill the registers
#else
constexpr int V = 8, ROWS = 6;
#endif
constexpr int COLUMNS = 2 * V, DEPTH = 256, MOST = 8 * ROWS;
typedef float vec __attribute__((vector_size(4 * V)));

extern "C" const int columns = COLUMNS;

static inline vec load(const float* x) {
    vec y;
    memcpy(&y, x, sizeof y);
    return y;
}

// y [M, COLUMNS] += x [M, n] w [n, COLUMNS], and a line of what comes next is fetched with each k.
template <int M>
static void block(const float* x, int64_t K, const float* w, int n, float* y, const char* next,
                  int stride) {
    vec a[M], b[M];
    for (int m = 0; m < M; m++) a[m] = load(y + m * COLUMNS), b[m] = load(y + m * COLUMNS + V);
    for (int k = 0; k < n; k++) {
        vec left = load(w + k * COLUMNS), right = load(w + k * COLUMNS + V);
        if (M > 1) __builtin_prefetch(next + k * stride);  // one row is read as fast without
        for (int m = 0; m < M; m++) a[m] += x[m * K + k] * left, b[m] += x[m * K + k] * right;
    }
    for (int m = 0; m < M; m++) {
        memcpy(y + m * COLUMNS, a + m, sizeof(vec));
        memcpy(y + m * COLUMNS + V, b + m, sizeof(vec));
    }
}

// The block of m <= M rows: for each number of rows there is a loop of its own.
template <int M, typename... Rest>
static void blocks(int m, Rest... rest) {
    if constexpr (M > 1) {
        if (m < M) return blocks<M - 1>(m, rest...);
    }
    block<M>(rest...);
}

// x [B, K], w [panels of N, K, COLUMNS], bias [N] or null -> y [B, N]
extern "C" void run(const float* x, const float* w, const float* bias, float* y, int64_t B,
                    int64_t K, int64_t N, int threads) {
    int64_t panels = (N + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        int64_t start = p * COLUMNS, width = std::min<int64_t>(COLUMNS, N - start);
        float sums[MOST * COLUMNS];
        for (int64_t at = 0; at < B; at += MOST) {
            int64_t rows = std::min<int64_t>(MOST, B - at), groups = (rows + ROWS - 1) / ROWS;
            memset(sums, 0, rows * COLUMNS * sizeof(float));
            for (int64_t b = 0; bias && b < rows; b++)
                memcpy(sums + b * COLUMNS, bias + start, width * sizeof(float));
            for (int64_t k = 0; k < K; k += DEPTH) {
                const float* here = w + (p * K + k) * COLUMNS;
                int n = std::min<int64_t>(DEPTH, K - k), stride = COLUMNS * sizeof(float) / groups;
                for (int64_t g = 0; g < groups; g++) {
                    int64_t first = g * rows / groups, m = (g + 1) * rows / groups - first;
                    const char* next = (const char*)(here + n * COLUMNS) + g * n * stride;
                    blocks<ROWS>(m, x + (at + first) * K + k, K, here, n, sums + first * COLUMNS,
                                 next, stride);
                }
            }
            for (int64_t b = 0; b < rows; b++)
                memcpy(y + (at + b) * N + start, sums + b * COLUMNS, width * sizeof(float));
        }
    }
}
