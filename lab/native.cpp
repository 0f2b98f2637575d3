// How PyTorch calls the kernels in C++: as operations of its own. To call them by way of Python
// takes about as long as a small product.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

using at::Tensor;

static std::vector<void*> kernels;  // an operation is told which one by its place here

extern "C" int64_t keep(void* kernel) {
    kernels.push_back(kernel);
    return kernels.size() - 1;
}

static Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values,
                     const Tensor& positions, int64_t S, int64_t kernel) {
    TORCH_CHECK(keys.scalar_type() == query.scalar_type());
    Tensor q = query.contiguous(), out = at::empty_like(q);
    auto run = (void (*)(const void*, const void*, const void*, const int64_t*, void*, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t, int))kernels[kernel];
    run(q.const_data_ptr(), keys.const_data_ptr(), values.const_data_ptr(),
        positions.const_data_ptr<int64_t>(), out.data_ptr(), q.size(0), q.size(1), keys.size(1), S,
        keys.stride(0), keys.stride(1), at::get_num_threads());
    return out;
}

static Tensor multiply(const Tensor& rows, const Tensor& panels, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& bias, int64_t N, int64_t kernel) {
    TORCH_CHECK((scale ? *scale : panels).scalar_type() == rows.scalar_type());
    Tensor x = rows.contiguous();
    auto sizes = x.sizes().vec();
    int64_t K = sizes.back();
    sizes.back() = N;
    Tensor y = at::empty(sizes, x.options());
    auto run = (void (*)(const void*, const void*, const void*, const void*, void*, int64_t,
                         int64_t, int64_t, int))kernels[kernel];
    run(x.const_data_ptr(), panels.const_data_ptr(), scale ? scale->const_data_ptr() : nullptr,
        bias ? bias->const_data_ptr() : nullptr, y.data_ptr(), x.numel() / K, K, N,
        at::get_num_threads());
    return y;
}

TORCH_LIBRARY_FRAGMENT(lab, m) {
    m.def("attend_on_cpu(Tensor q, Tensor k, Tensor v, Tensor at, SymInt S, int kernel) -> Tensor");
    m.def(
        "multiply_on_cpu(Tensor x, Tensor panels, Tensor? scale, Tensor? bias, int N, int kernel)"
        " -> Tensor");
}

TORCH_LIBRARY_IMPL(lab, CPU, m) {
    m.impl("attend_on_cpu", attend);
    m.impl("multiply_on_cpu", multiply);
}
