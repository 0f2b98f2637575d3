// Attention of a decoding step on a CPU: one query per row, each over its own length.
//
// Flash-Decoding (Dao et al., 2023): positions in chunks over the threads, merged by their sums of
// exponentials. lab/cpu.py compiles it for a model's numbers (float or bfloat16), G (query
// heads of a KV head) and WIDTH (of a head, a multiple of 8). Reading keys and values once should
// be what limits it: the next ones are fetched while some are multiplied.

#include <algorithm>
#include <utility>
#include <vector>

#define NARROW (WIDTH % 32)
#include "vectors.h"

constexpr int AHEAD = 2 * V * sizeof(float) / sizeof(X);  // positions between fetching and use

#ifdef __clang__
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, word{__VA_ARGS__})
#endif

// The sums of n vectors, a power of 2: in place i that of x[i % n], once n is V.
template <int n = V>
static inline vec sums(const vec* x) {
    if constexpr (n == 1) return x[0];
    else {
        vec a = sums<n / 2>(x), b = sums<n / 2>(x + n / 2);
        return [&]<int... i>(std::integer_sequence<int, i...>) {
            return SHUFFLED(a, b, (i & n / 2 ? V + i : i)...) +
                   SHUFFLED(a, b, (i & n / 2 ? V + i : i) ^ n / 2 ...);
        }(std::make_integer_sequence<int, V>());
    }
}

// The first n of V rows as they are multiplied, the others 0: where they are, or in `room`.
static inline const Y* rows(const X* x, int n, Y* room) {
    if (std::is_same_v<X, Y> && n >= V) return (const Y*)x;
    for (int i = 0; i < std::min(n, V) * WIDTH; i++) room[i] = factor(x[i]);
    for (int i = n * WIDTH; i < V * WIDTH; i++) room[i] = 0;
    return room;
}

// V rows, P by P: [V, WIDTH] -> [V / P, WIDTH, P].
static inline const Y* panel(const Y* x, [[maybe_unused]] Y* room) {
#if PAIRS
    uint16_t low[2 * V], high[2 * V];
    for (int i = 0; i < 2 * V; i++) low[i] = i / 2 + i % 2 * 2 * V, high[i] = low[i] + V;
    for (int j = 0; j < V; j += 2)
        for (int d = 0; d < WIDTH; d += 2 * V) {
            const Y* row = x + j * WIDTH + d;
            auto a = load<__m512i>(row), b = load<__m512i>(row + WIDTH);
            auto left = _mm512_permutex2var_epi16(a, load<__m512i>(low), b);
            auto right = _mm512_permutex2var_epi16(a, load<__m512i>(high), b);
            memcpy(room + j * WIDTH + d * 2, &left, sizeof left);
            memcpy(room + j * WIDTH + d * 2 + 2 * V, &right, sizeof right);
        }
    return room;
#else
    return x;
#endif
}

// Have a part of V rows fetched from memory with each query head.
static inline void fetch(const X* next, int g) {
    constexpr int lines = V * WIDTH * sizeof(X) / 64;
    for (int i = g * lines / G; i < (g + 1) * lines / G; i++)
        __builtin_prefetch((const char*)next + i * 64);
}

// q [G, WIDTH] over k, v [n, WIDTH] -> out [G, WIDTH], and lse [G], the logarithms of the sums.
static void attend_chunk(const X* q, const X* k, const X* v, int n, float* out, float* lse) {
    float s[G][CHUNK], whole[G] = {};
    Y x[G * WIDTH], p[G][CHUNK], room[V * WIDTH], pairs[V * WIDTH];
    vec y[G][WIDTH / V] = {};
    for (int i = 0; i < G * WIDTH; i++) x[i] = factor(q[i]);
    for (int i = 0; i < n; i += V) {
        const Y* tile = rows(k + i * WIDTH, n - i, room);
        for (int g = 0; g < G; g++) {
            fetch(k + (i + AHEAD) * WIDTH, g);
            vec dot[V] = {};
            for (int d = 0; d < WIDTH; d += V * P) {
                vector z = load<vector>(x + g * WIDTH + d);
                for (int j = 0; j < V; j++)
                    dot[j] = add(dot[j], z, load<vector>(tile + j * WIDTH + d));
            }
            vec score = only(sums(dot) / sqrtf(WIDTH), n - i);
            memcpy(s[g] + i, &score, sizeof score);
        }
    }
    for (int g = 0; g < G; g++) {
        vec largest = load<vec>(s[g]), total = {};
        for (int i = V; i < n; i += V) {
            vec z = load<vec>(s[g] + i);
            largest = z > largest ? z : largest;
        }
        float most = *std::max_element((float*)&largest, (float*)&largest + V);
        for (int i = 0; i < n; i += V) {
            vec e = exponential(load<vec>(s[g] + i) - most);
            total += e;
            memcpy(s[g] + i, &e, sizeof e);
        }
        for (int i = 0; i < CHUNK; i++) store(p[g] + i, i < n ? s[g][i] : 0);
        for (int i = 0; i < V; i++) whole[g] += total[i];
        lse[g] = most + logf(whole[g]);
    }
    for (int i = 0; i < n; i += V) {
        const Y* tile = panel(rows(v + i * WIDTH, n - i, room), pairs);
        for (int g = 0; g < G; g++) {
            fetch(v + (i + AHEAD) * WIDTH, g);
            for (int j = 0; j < V; j += P) {
                vector z = all(p[g] + i + j);
                for (int d = 0; d < WIDTH / V; d++)
                    y[g][d] = add(y[g][d], z, load<vector>(tile + j * WIDTH + d * V * P));
            }
        }
    }
    for (int g = 0; g < G; g++)
        for (int d = 0; d < WIDTH / V; d++) y[g][d] /= whole[g];
    memcpy(out, y, sizeof y);
}

// q, out [B, K, G, WIDTH]; cache_rows [B]; last [B] < S, the last position that each of them
// sees; keys, values [., K, ., WIDTH], with the strides of a row and of a head; room for parts
// [B, K, chunks, G, WIDTH], for the chunks of S positions, and for sums [B, K, chunks, G]. All
// threads of a team call it, and share the chunks.
extern "C" void run(const X* q, const int64_t* cache_rows, const int64_t* last, const X* keys,
                    const X* values, X* out, int64_t B, int64_t K, int64_t S, int64_t row,
                    int64_t head, float* y, float* sums) {
    int64_t chunks = (S + CHUNK - 1) / CHUNK;
    static thread_local std::vector<int64_t> tasks;  // [B + 1]: a row's first, of chunks in use
    tasks.resize(B + 1);
    for (int64_t b = 0; b < B; b++) tasks[b + 1] = tasks[b] + K * (last[b] / CHUNK + 1);
    const int64_t *begin = tasks.data(), *end = begin + B;
    // Guided: what a thread reads lies side by side in memory.
#pragma omp for schedule(guided)
    for (int64_t task = 0; task < *end; task++) {
        int64_t b = std::upper_bound(begin, end, task) - begin - 1, used = last[b] / CHUNK + 1;
        int64_t kv = (task - begin[b]) / used, chunk = (task - begin[b]) % used;
        int64_t first = chunk * CHUNK, n = std::min<int64_t>(CHUNK, last[b] + 1 - first);
        int64_t start = cache_rows[b] * row + kv * head + first * WIDTH, bk = b * K + kv;
        int64_t at = bk * chunks + chunk;
        attend_chunk(q + bk * G * WIDTH, keys + start, values + start, n,
                     y + at * G * WIDTH, sums + at * G);
    }
#pragma omp for
    for (int64_t query = 0; query < B * K * G; query++) {  // merge its chunks
        int64_t bk = query / G, used = last[bk / K] / CHUNK + 1;
        int64_t at = bk * chunks * G + query % G;
        float most = sums[at], total = 0, z[WIDTH] = {};
        for (int64_t c = 1; c < used; c++) most = std::max(most, sums[at + c * G]);
        for (int64_t c = 0; c < used; c++) {
            float weight = expf(sums[at + c * G] - most);
            total += weight;
            for (int d = 0; d < WIDTH; d++) z[d] += weight * y[(at + c * G) * WIDTH + d];
        }
        for (int d = 0; d < WIDTH; d++) store(out + query * WIDTH + d, z[d] / total);
    }
}
