// The transformer on a CPU: each row goes on by one embedding, or by a prompt's, in one call.
//
// lab/cpu.py compiles it for a model's numbers (float or bfloat16). Products and attention, which
// take the time, are kernels of their own (lab/products.cpp, lab/attention.cpp, lab/prefill.cpp);
// what stands between them is here, as in model.py: what model.py rounds to its numbers is rounded,
// too. One team of threads goes through all layers together; `omp for` shares out embeddings, and
// waits for all.

#include <algorithm>
#include <memory>
#include <vector>

#include "vectors.h"

typedef void Multiply(const X* x, const void* panels, const X* scale, const X* bias, X* y,
                      int64_t B, int64_t K, int64_t N);
typedef void Attend(const X* q, const int64_t* rows, const int64_t* last, const X* keys,
                    const X* values, X* out, int64_t B, int64_t K, int64_t S, int64_t row,
                    int64_t head, float* parts, float* lse);
typedef void Prefill(const X* q, const int64_t* rows, const int64_t* last, const X* keys,
                     const X* values, X* out, int64_t B, int64_t T, int64_t K, int64_t row,
                     int64_t head);

struct Matrix {  // [N, K], in panels of lab/products.cpp; scale and bias may be null
    const void* panels;
    const X *scale, *bias;
    int64_t K, N;
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    const X *norm, *q_norm, *k_norm, *mlp_norm;  // q_norm and k_norm may be null
};

struct Model {
    const Layer* layers;
    Matrix head;
    const X* norm;
    int64_t count, d, H, K, h, F;  // layers; widths and heads as in model.py; F: of an MLP
    float eps;
    Multiply* multiply;
    Attend* attend;
    Prefill* prefill;
};

// y = x / sqrt(mean x² + eps) * weight
static void rms_norm(const X* x, const X* weight, X* y, int64_t n, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += number(x[i]) * number(x[i]);
    float scale = 1 / sqrtf(sum / n + eps);
    for (int64_t i = 0; i < n; i++) store(y + i, number(x[i]) * scale * number(weight[i]));
}

// Pairs half a head apart: x cos + (x, rolled by half) sin
static void rotate(const X* x, const float* cos, const float* sin, X* y, int64_t h) {
    for (int64_t i = 0; i < h / 2; i++) {
        float a = number(x[i]), b = number(x[i + h / 2]);
        store(y + i, a * cos[i] + b * sin[i]);
        store(y + i + h / 2, b * cos[i + h / 2] + a * sin[i + h / 2]);
    }
}

// y = silu(gate) * up: V at a time, by e^-|x|, which is 1 at most, and the last few one by one
static void swiglu(const X* gate, const X* up, X* y, int64_t n) {
    int64_t i = 0;
    for (; i + V <= n; i += V) {
        vec x = numbers(gate + i), e = exponential(x < 0 ? x : -x);
        vec z = x * (x < 0 ? e : vec{} + 1) / (1 + e);
        X silu[V];
        store(silu, z);
        store(y + i, numbers(silu) * numbers(up + i));
    }
    for (; i < n; i++) {
        X silu;
        store(&silu, number(gate[i]) / (1 + expf(-number(gate[i]))));
        store(y + i, number(silu) * number(up[i]));
    }
}

// x [B, d]: T embeddings for each of R rows, B = R T; overwritten. Hidden states go to places [B]
// of hidden [., d]; in a step (T = 1) logits to the same places of logits [., vocabulary], which is
// null for a prompt. rows, last [B]: those of the cache, and the new positions there; cos, sin
// [B, h]: at these. keys, values [layers] of [., K, ., h], with the strides of a row and of a head.
// S: more than any last.
extern "C" void run(const Model* model, X* x, const int64_t* rows, const int64_t* last,
                    const float* cos, const float* sin, X* const* keys, X* const* values,
                    const int64_t* places, X* hidden, float* logits, int64_t R, int64_t T,
                    int64_t S, int64_t row, int64_t head, int threads) {
    const Model& m = *model;
    int64_t H = m.H, K = m.K, h = m.h, heads = H + 2 * K, chunks = (S + CHUNK - 1) / CHUNK;
    int64_t B = R * T;
    static thread_local std::vector<X> kept;  // a step's room: what it has had stays
    static thread_local std::vector<float> sums;
    int64_t wide = std::max(heads * h, 2 * m.F);
    size_t step = logits ? B : 0, own = std::max(m.d, m.F) + wide + 2 * H * h + m.d;
    kept.resize(std::max(kept.size(), step * (own + m.head.N)));
    sums.resize(std::max(sums.size(), step * H * chunks * (h + 1)));
    std::unique_ptr<X[]> passing(new X[logits ? 0 : B * own]);  // a prompt's, which may be long
    X *n = logits ? kept.data() : passing.get(), *y = n + B * std::max(m.d, m.F),
      *q = y + B * wide, *a = q + B * H * h, *z = a + B * H * h, *out = z + B * m.d;
    float *parts = sums.data(), *lse = parts + B * H * chunks * h;
    auto multiply = [&](const X* from, const Matrix& w, X* to) {
        m.multiply(from, w.panels, w.scale, w.bias, to, B, w.K, w.N);
    };
    auto turn = [&](X* from, const X* weight, X* to, int64_t b) {
        if (weight) rms_norm(from, weight, from, h, m.eps);
        rotate(from, cos + b * h, sin + b * h, to, h);
    };
    auto add_and_norm = [&](const X* weight, X* to) {
#pragma omp for
        for (int64_t b = 0; b < B; b++) {
            X *sum = x + b * m.d, *more = z + b * m.d;
            for (int64_t i = 0; i < m.d; i++) store(sum + i, number(sum[i]) + number(more[i]));
            rms_norm(sum, weight, to + b * m.d, m.d, m.eps);
        }
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t b = 0; b < B; b++)
            rms_norm(x + b * m.d, m.layers[0].norm, n + b * m.d, m.d, m.eps);
        for (int64_t l = 0; l < m.count; l++) {
            const Layer& layer = m.layers[l];
            multiply(n, layer.qkv, y);
#pragma omp for
            for (int64_t b = 0; b < B; b++) {
                X *from = y + b * heads * h, *k = from + H * h, *v = k + K * h;
                int64_t at = rows[b] * row + last[b] * h;
                for (int64_t i = 0; i < H; i++)
                    turn(from + i * h, layer.q_norm, q + (b * H + i) * h, b);
                for (int64_t i = 0; i < K; i++) {
                    turn(k + i * h, layer.k_norm, keys[l] + at + i * head, b);
                    memcpy(values[l] + at + i * head, v + i * h, h * sizeof(X));
                }
            }
            if (logits)
                m.attend(q, rows, last, keys[l], values[l], a, B, K, S, row, head, parts, lse);
            else m.prefill(q, rows, last, keys[l], values[l], a, R, T, K, row, head);
            multiply(a, layer.o, z);
            add_and_norm(layer.mlp_norm, n);
            multiply(n, layer.gate_up, y);
#pragma omp for
            for (int64_t b = 0; b < B; b++)
                swiglu(y + b * 2 * m.F, y + b * 2 * m.F + m.F, n + b * m.F, m.F);
            multiply(n, layer.down, z);
            bool end = l == m.count - 1;
            add_and_norm(end ? m.norm : m.layers[l + 1].norm, n);
        }
#pragma omp for nowait
        for (int64_t b = 0; b < B; b++)
            memcpy(hidden + places[b] * m.d, n + b * m.d, m.d * sizeof(X));
        if (logits) {
            multiply(n, m.head, out);
            for (int64_t b = 0; b < B; b++) {
                float* to = logits + places[b] * m.head.N;
#pragma omp for nowait
                for (int64_t i = 0; i < m.head.N; i++) to[i] = number(out[b * m.head.N + i]);
            }
        }
    }
}
