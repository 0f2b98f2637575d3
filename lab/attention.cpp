// Attention of a decoding step on a CPU: one query per row, each over its own length.
//
// Flash-Decoding (Dao et al., 2023): positions in chunks over the threads, merged by their sums of
// exponentials. lab/attention.py compiles it for a model's T (its numbers: float, or uint16_t for
// bfloat16), G (query heads of a KV head) and WIDTH (of a head, a multiple of 8). Reading keys and
// values once should be what limits it: the next ones are fetched while some are multiplied.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int CHUNK = 256;    // positions of a task, at any length: bits depend on no other row
constexpr int ROWS = 8;       // positions at once, as many as a vector has numbers
constexpr int D = WIDTH / 8;  // vectors of a head
typedef float vec __attribute__((vector_size(32)));
typedef uint16_t half __attribute__((vector_size(16)));
typedef int32_t word __attribute__((vector_size(32)));

static inline vec load(const float* x) {
    vec y;
    memcpy(&y, x, sizeof y);
    return y;
}

static inline vec load(const uint16_t* x) {  // bfloat16: the upper half of a float
    half y;
    memcpy(&y, x, sizeof y);
    return (vec)(__builtin_convertvector(y, word) << 16);
}

static inline void store(float* x, vec y) { memcpy(x, &y, sizeof y); }
static inline void store(float* x, float y) { *x = y; }

static inline void store(uint16_t* x, float y) {
    uint32_t bits;
    memcpy(&bits, &y, sizeof y);
    *x = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

static inline float sum(vec x) {
    return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}

// e^x for x <= 0, to float32's last digit or two: 2^n e^f, e^f by its series; at least e^-87.
static inline vec exponential(vec x) {
    constexpr float magic = 3 << 22;  // x + magic - magic is x, rounded to an integer
    x = x < -87 ? vec{} - 87 : x;
    vec n = x * float(M_LOG2E) + magic - magic, p = vec{} + 1;
    vec f = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: n times it is exact
    for (int k = 7; k > 0; k--) p = p * f * (1.0f / k) + 1;
    return p * (vec)(__builtin_convertvector(n + 127, word) << 23);
}

// The first n of ROWS rows as floats, the others 0: where they are, or copied into `room`.
static inline const float* rows(const T* x, int n, float* room) {
    if (sizeof(T) == sizeof(float) && n >= ROWS) return (const float*)x;
    for (int i = 0; i < ROWS * D; i++) store(room + i * 8, i < n * D ? load(x + i * 8) : vec{});
    return room;
}

// Have a part of the next rows fetched from memory with each query head.
static inline void fetch(const T* next, int g) {
    constexpr int lines = ROWS * WIDTH * sizeof(T) / 64;
    for (int i = g * lines / G; i < (g + 1) * lines / G; i++)
        __builtin_prefetch((const char*)next + i * 64);
}

// q [G, WIDTH] over k, v [n, WIDTH] -> out [G, WIDTH], and lse [G], the logarithms of the sums.
static void attend_chunk(const T* q, const T* k, const T* v, int n, float* out, float* lse) {
    float s[G][CHUNK], room[ROWS * WIDTH];
    vec x[G][D], y[G][D] = {};
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) x[g][d] = load(q + g * WIDTH + d * 8) / sqrtf(WIDTH);
    for (int i = 0; i < n; i += ROWS) {
        const float* tile = rows(k + i * WIDTH, n - i, room);
        for (int g = 0; g < G; g++) {
            fetch(k + (i + ROWS) * WIDTH, g);
            vec dot[ROWS] = {};
            for (int d = 0; d < D; d++)
                for (int j = 0; j < ROWS; j++) dot[j] += x[g][d] * load(tile + j * WIDTH + d * 8);
            for (int j = 0; j < ROWS; j++) s[g][i + j] = i + j < n ? sum(dot[j]) : -INFINITY;
        }
    }
    for (int g = 0; g < G; g++) {
        vec most = load(s[g]), total = {};
        for (int i = 8; i < n; i += 8) {
            vec z = load(s[g] + i);
            most = z > most ? z : most;
        }
        float m = *std::max_element((float*)&most, (float*)&most + 8);
        for (int i = 0; i < n; i += 8) {
            vec p = exponential(load(s[g] + i) - m);
            total += p;
            store(s[g] + i, p);
        }
        float whole = sum(total);
        lse[g] = m + logf(whole);
        for (int i = 0; i < n; i++) s[g][i] /= whole;
    }
    for (int i = 0; i < n; i += ROWS) {
        const float* tile = rows(v + i * WIDTH, n - i, room);
        for (int g = 0; g < G; g++) {
            fetch(v + (i + ROWS) * WIDTH, g);
            for (int d = 0; d < D; d++)
                for (int j = 0; j < ROWS; j++)
                    y[g][d] += s[g][i + j] * load(tile + j * WIDTH + d * 8);
        }
    }
    memcpy(out, y, sizeof y);
}

// q, out [B, K, G, WIDTH]; keys, values [B, K, ., WIDTH], with the strides of a row and of a head;
// last [B] < S, the last position that each row sees.
extern "C" void run(const T* q, const T* keys, const T* values, const int64_t* last, T* out,
                    int64_t B, int64_t K, int64_t S, int64_t row, int64_t head, int threads) {
    int64_t chunks = (S + CHUNK - 1) / CHUNK;
    static thread_local std::vector<float> parts, lse;  // [B, K, chunks, G, WIDTH], [.., G]
    parts.resize(B * K * chunks * G * WIDTH), lse.resize(B * K * chunks * G);
    float *y = parts.data(), *sums = lse.data();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * K * chunks; task++) {
            int64_t first = task % chunks * CHUNK, bk = task / chunks, b = bk / K;
            if (first > last[b]) continue;
            int64_t n = std::min<int64_t>(CHUNK, last[b] + 1 - first);
            int64_t start = b * row + bk % K * head + first * WIDTH;
            attend_chunk(q + bk * G * WIDTH, keys + start, values + start, n,
                         y + task * G * WIDTH, sums + task * G);
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
}
