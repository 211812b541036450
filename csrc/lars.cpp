// The operator simclr_fast::lars_step, its CPU kernel, and Python's module. See lars.h for the mathematics.
#include "lars.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

// Only torch's CUDA builds have it: a strong reference would make its CPU builds refuse this file.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace simclr_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t FIELDS = 8;  // of a row of hyper
constexpr int64_t GRAIN = 4;   // chunks that pay for waking a thread

bool alike(const Tensor& t, const Tensor& shape, const Tensor& kind) {
    auto a = t.sizes(), b = shape.sizes();
    return std::equal(a.begin(), a.end(), b.begin(), b.end()) && t.scalar_type() == kind.scalar_type() &&
           t.device() == kind.device();
}

// Whether t fills one stretch of memory, its elements in the order of `like` (channels_last is one such
// order).
bool in_order(const Tensor& t, const Tensor& like) {
    int64_t span = 1;
    for (int64_t k = 0; k < t.dim(); ++k) {
        if (t.sizes()[k] != 1 && t.strides()[k] != like.strides()[k]) return false;
        span += (t.sizes()[k] - 1) * t.strides()[k];
    }
    return span == t.numel();
}

// The tensors of a step as pointers. Those in another layout are stepped as copies; `write_back` copies back.
template <class T>
struct Plan {
    std::vector<Entry<T>> entries;
    std::vector<size_t> owner;                      // of each chunk: its entry
    std::vector<std::pair<Tensor, Tensor>> copies;  // (the caller's, ours)

    Plan(const Tensors& params, const Tensors& grads, const Tensors& velocities, const std::vector<int64_t>& groups,
         const Tensor& hyper) {
        auto pointer = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
        for (size_t n = 0; n < params.size(); ++n) {
            STD_TORCH_CHECK(groups[n] >= 0 && groups[n] < hyper.sizes()[0], "groups[", n, "] is not in hyper");
            for (const Tensor* t : {&params[n], &grads[n], &velocities[n]})
                STD_TORCH_CHECK(alike(*t, params[n], params[0]), "tensors differ in shape, dtype or device");
            if (params[n].numel() == 0) continue;
            Tensor w = in_order(params[n], params[n]) ? params[n] : copy(params[n], params[n]);
            Tensor g = in_order(grads[n], w) ? grads[n] : copy(grads[n], w);
            Tensor v = in_order(velocities[n], w) ? velocities[n] : copy(velocities[n], w);
            const double* h = static_cast<const double*>(hyper.const_data_ptr()) + FIELDS * groups[n];
            entries.push_back({pointer(w), pointer(g), pointer(v), w.numel(), int64_t(owner.size()), T(h[0]), T(h[1]),
                               T(h[2]), T(h[3]), h[4] != 0, h[5] != 0, h[6] != 0, h[7] != 0});
            owner.insert(owner.end(), entries.back().chunks(), entries.size() - 1);
        }
    }

    Tensor copy(const Tensor& source, const Tensor& like) {
        Tensor ours = torch::stable::empty_like(like);
        torch::stable::copy_(ours, source);
        copies.emplace_back(source, ours);
        return ours;
    }

    void write_back() {
        for (auto& [theirs, ours] : copies) torch::stable::copy_(theirs, ours);
    }
};

// Calls work(entry, chunk, begin, end) for all chunks of all tensors, in parallel.
template <class T, class Work>
void for_each_chunk(const Plan<T>& plan, const Work& work) {
    torch::stable::parallel_for(0, plan.owner.size(), GRAIN, [&](int64_t first, int64_t last) {
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const Entry<T>& e = plan.entries[plan.owner[chunk]];
            int64_t begin = (chunk - e.first_chunk) * CHUNK;
            work(e, chunk, begin, std::min(begin + CHUNK, e.numel));
        }
    });
}

template <class T>
void step_cpu(Plan<T> plan) {
    std::vector<Norms> norms(plan.owner.size());
    for_each_chunk(plan, [&](Entry<T> e, int64_t chunk, int64_t begin, int64_t end) {
        double w = 0, x = 0;
#pragma omp simd reduction(+ : w, x)
        for (int64_t i = begin; i < (e.adapt ? end : begin); ++i) {
            double wi = e.w[i], xi = e.divisor(i);
            w += wi * wi;
            x += xi * xi;
        }
        norms[chunk] = {w, x};
    });
    for_each_chunk(plan, [&](Entry<T> e, int64_t, int64_t begin, int64_t end) {
        Norms sum;
        for (int64_t k = 0; k < e.chunks(); ++k) sum.add(norms[e.first_chunk + k]);
        Factors<T> f = e.factors(sum);
#pragma omp simd
        for (int64_t i = begin; i < end; ++i) e.update(i, f);
    });
    plan.write_back();
}

void step_cuda(Plan<float> plan, const Tensor& like) {
    torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    Tensor scratch = torch::stable::new_empty(like, {2 * int64_t(plan.owner.size())}, ScalarType::Double);
    auto* partial = static_cast<Norms*>(scratch.mutable_data_ptr());
    const char* error = launch_cuda(plan.entries.data(), plan.entries.size(), partial, stream);
    STD_TORCH_CHECK(!error, "lars_step: ", error);
    plan.write_back();
}

// A row of hyper: lr, weight_decay, momentum, trust, adapt, nesterov, classic, lr_outside. groups: each
// tensor's row.
void lars_step(Tensors params, Tensors grads, Tensors velocities, std::vector<int64_t> groups, Tensor hyper) {
    size_t n = params.size();
    STD_TORCH_CHECK(grads.size() == n && velocities.size() == n && groups.size() == n, "lists differ in length");
    bool rows = hyper.dim() == 2 && hyper.sizes()[1] == FIELDS && hyper.is_contiguous() && hyper.is_cpu();
    STD_TORCH_CHECK(rows && hyper.scalar_type() == ScalarType::Double, "hyper must be CPU float64 [groups, 8]");
    if (n == 0) return;
    auto dtype = params[0].scalar_type();
    if (dtype == ScalarType::Double && params[0].is_cpu())
        return step_cpu(Plan<double>(params, grads, velocities, groups, hyper));
    STD_TORCH_CHECK(dtype == ScalarType::Float, "lars_step takes float32 tensors, on the CPU float64 too");
    Plan<float> plan(params, grads, velocities, groups, hyper);
    params[0].is_cpu() ? step_cpu(std::move(plan)) : step_cuda(std::move(plan), params[0]);
}

}  // namespace
}  // namespace simclr_fast

STABLE_TORCH_LIBRARY(simclr_fast, m) {
    m.def(
        "lars_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] velocities, int[] groups, Tensor hyper) "
        "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) { m.impl("lars_step", TORCH_BOX(&simclr_fast::lars_step)); }
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CUDA, m) {
    if (simclr_fast::launch_cuda) m.impl("lars_step", TORCH_BOX(&simclr_fast::lars_step));
}

// An empty Python module. Python.h may not be installed, so its stable ABI's PyModuleDef is written out:
// (object header, init, index, copy), name, doc, size, and five hooks.
static const void* module_def[13] = {(void*)1, 0, 0, 0, 0, "_C", 0, (void*)-1};
extern "C" void* PyModule_Create2(void*, int);
extern "C" __attribute__((visibility("default"))) void* PyInit__C() { return PyModule_Create2(module_def, 3); }
