// Attention of a prompt on a CPU: many queries per row, each over all positions up to its own.
//
// FlashAttention (Dao et al., 2022): positions in tiles, and what is summed is corrected when a
// larger score is met. lab/cpu.py compiles it for a model's numbers (float or bfloat16), G
// (query heads of a KV head) and WIDTH (of a head, even). Both products are lab/vectors.h's: for
// each task, which is some queries, a tile's keys and values are laid out in panels.

#include <omp.h>

#include <algorithm>
#include <memory>

#include "vectors.h"

constexpr int TILE = 256;             // positions, at any length: bits depend on no other query
constexpr int LEAST = 16, MOST = 64;  // queries of a task; each has G heads, which are its rows
constexpr int ROOM = MOST * G;        // rows of a task
constexpr int HELD = 24;              // rows whose scores are held at once
constexpr int PARTS = (WIDTH + COLUMNS - 1) / COLUMNS;  // panels of a tile's values

struct Workspace {  // what a thread works in
    Y x[ROOM * WIDTH];                 // [rows, WIDTH]: queries
    Y keys[TILE * WIDTH];              // [TILE / COLUMNS, WIDTH / P, COLUMNS, P]
    Y values[PARTS * TILE * COLUMNS];  // [PARTS, TILE / P, COLUMNS, P]
    float scores[HELD * TILE];         // [panels, rows, COLUMNS]
    Y weights[HELD * TILE];            // [rows, TILE]
    float y[PARTS * ROOM * COLUMNS];   // [PARTS, ROOM, COLUMNS]: sums of weights times values
    float most[ROOM], sum[ROOM];       // the largest score, the sum of weights
};

// n keys and values of a tile, [n, WIDTH], in panels; what is not there is 0, or has weight 0.
static void lay_out(const X* keys, const X* values, int n, Workspace& work) {
    if (n < TILE) memset(work.keys, 0, sizeof work.keys);
    if (n < TILE || WIDTH % COLUMNS) memset(work.values, 0, sizeof work.values);
    for (int i = 0; i < n; i++)
        for (int d = 0; d < WIDTH; d += P) {
            Y* step = work.keys + (i / COLUMNS * WIDTH + d) * COLUMNS + i % COLUMNS * P;
            for (int p = 0; p < P; p++) step[p] = factor(keys[i * WIDTH + d + p]);
        }
    for (int i = 0; i < n; i += P) {
        const X *one = values + i * WIDTH, *other = i + 1 < n ? one + WIDTH : one;
        for (int part = 0; part < PARTS; part++) {
            Y* step = work.values + (part * TILE + i) * COLUMNS;
            for (int d = part * COLUMNS; d < std::min(WIDTH, (part + 1) * COLUMNS); d++)
                for (int p = 0; p < P; p++) *step++ = factor(p ? other[d] : one[d]);
        }
    }
}

// A row's weights, e^(score - most), of the first n positions of a tile, 0 for the others of its
// panels, which are `stride` apart. -> What sums of weights until now have to be multiplied by.
static float online_softmax(float* scores, int panels, int stride, int64_t n, Y* weights,
                            float& most, float& sum) {
    const float scale = 1 / sqrtf(WIDTH), before = most;
    vec largest = vec{} - INFINITY, total = {};
    for (int p = 0; p < panels; p++)
        for (int c = 0; c < COLUMNS; c += V) {
            vec z = load<vec>(scores + p * stride + c);
            if (n < p * COLUMNS + c + V) {
                z = only(z, n - p * COLUMNS - c);
                memcpy(scores + p * stride + c, &z, sizeof z);
            }
            largest = z > largest ? z : largest;
        }
    for (int i = 0; i < V; i++) most = std::max(most, largest[i]);
    for (int p = 0; p < panels; p++)
        for (int c = 0; c < COLUMNS; c += V) {
            vec e = exponential((load<vec>(scores + p * stride + c) - most) * scale);
            total += e;
#if PAIRS
            __m256bh w = _mm512_cvtneps_pbh((__m512)e);
#else
            vec w = e;
#endif
            memcpy(weights + p * COLUMNS + c, &w, sizeof w);
        }
    float decay = expf((before - most) * scale);
    sum *= decay;
    for (int i = 0; i < V; i++) sum += total[i];
    return decay;
}

// q [n, G, WIDTH], with a stride, at positions [n], over keys and values [., WIDTH] -> out, as q
static void attend(const X* q, const X* keys, const X* values, const int64_t* positions, X* out,
                   int n, int64_t stride, Workspace& work) {
    int rows = n * G;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < G * WIDTH; j++) work.x[i * G * WIDTH + j] = factor(q[i * stride + j]);
    for (int i = 0; i < rows; i++) work.most[i] = -INFINITY, work.sum[i] = 0;
    memset(work.y, 0, sizeof work.y);
    for (int64_t start = 0; start <= positions[n - 1]; start += TILE) {
        int there = std::min<int64_t>(TILE, positions[n - 1] + 1 - start);
        lay_out(keys + start * WIDTH, values + start * WIDTH, there, work);
        for (int first = 0; first < rows; first += HELD) {
            int count = std::min(HELD, rows - first);
            int64_t seen = positions[(first + count - 1) / G] + 1 - start;  // by the last of them
            int panels = (std::clamp<int64_t>(seen, 0, TILE) + COLUMNS - 1) / COLUMNS;
            memset(work.scores, 0, panels * count * COLUMNS * sizeof(float));
            for (int p = 0; p < panels; p++) {
                const Y* k = work.keys + p * COLUMNS * WIDTH;
                multiply(work.x + first * WIDTH, WIDTH, k, WIDTH / P,
                         work.scores + p * count * COLUMNS, count, k + COLUMNS * WIDTH);
            }
            for (int i = 0; i < count && panels; i++) {
                int row = first + i;
                float decay = online_softmax(
                    work.scores + i * COLUMNS, panels, count * COLUMNS,
                    positions[row / G] + 1 - start, work.weights + i * TILE, work.most[row],
                    work.sum[row]);
                for (int part = 0; part < PARTS && decay < 1; part++)
                    for (int c = 0; c < COLUMNS; c++)
                        work.y[(part * ROOM + row) * COLUMNS + c] *= decay;
            }
            for (int part = 0; part < PARTS; part++) {
                const Y* v = work.values + part * TILE * COLUMNS;
                multiply(work.weights, TILE, v, panels * COLUMNS / P,
                         work.y + (part * ROOM + first) * COLUMNS, count, v + TILE * COLUMNS);
            }
        }
    }
    for (int row = 0; row < rows; row++)
        for (int d = 0; d < WIDTH; d++) {
            float sum = work.y[(d / COLUMNS * ROOM + row) * COLUMNS + d % COLUMNS];
            store(out + row / G * stride + row % G * WIDTH + d, sum / work.sum[row]);
        }
}

// q, out [B, T, K, G, WIDTH]; cache_rows and positions [B, T], those one after another in each row:
// the last that each query sees; keys, values [., K, ., WIDTH], with the strides of a row and of a
// head. All threads of a team call it, and share the queries.
extern "C" void run(const X* q, const int64_t* cache_rows, const int64_t* positions, const X* keys,
                    const X* values, X* out, int64_t B, int64_t T, int64_t K, int64_t row,
                    int64_t head) {
    static thread_local auto work = std::make_unique_for_overwrite<Workspace>();
    int64_t length = std::clamp<int64_t>(B * K * T / (4 * omp_get_num_threads()), LEAST, MOST);
    int64_t parts = (T + length - 1) / length, stride = K * G * WIDTH;
#pragma omp for schedule(dynamic)
    for (int64_t task = B * K * parts - 1; task >= 0; task--) {  // the longest ones first
        int64_t bk = task % (B * K), b = bk / K, first = task / (B * K) * length;
        int64_t at = (b * T + first) * stride + bk % K * G * WIDTH;
        int64_t there = cache_rows[b * T] * row + bk % K * head;
        attend(q + at, keys + there, values + there, positions + b * T + first, out + at,
               std::min(length, T - first), stride, *work);
    }
}
