// The operator simclr_fast::lars_step, and Python's module. See lars.h for the mathematics.
#include "lars.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

// Only torch's CUDA builds have it: a strong reference would make its CPU builds refuse this file.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace simclr_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<std::optional<Tensor>>;

constexpr int64_t FIELDS = 9;  // of a row of hyper
constexpr int64_t WORD = sizeof(int64_t), ENTRY = 9, ROW = 8;
static_assert(sizeof(Entry) == ENTRY * WORD && sizeof(Row) <= ROW * WORD && sizeof(Chunk) == 3 * WORD);

Type type(const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return FLOAT;
        case ScalarType::Double: return DOUBLE;
        case ScalarType::Half: return HALF;
        case ScalarType::BFloat16: return BFLOAT16;
        default: return NONE;
    }
}

bool alike(const Tensor& t, const Tensor& shape, const Tensor& place) {
    auto a = t.sizes(), b = shape.sizes();
    return std::equal(a.begin(), a.end(), b.begin(), b.end()) && t.device() == place.device();
}

// Whether t fills one stretch of memory, its elements in the order of `like` (channels_last is one such
// order).
bool in_order(const Tensor& t, const Tensor& like) {
    if (t.numel() == 0) return true;
    int64_t span = 1;
    for (int64_t k = 0; k < t.dim(); ++k) {
        if (t.sizes()[k] != 1 && t.strides()[k] != like.strides()[k]) return false;
        span += (t.sizes()[k] - 1) * t.strides()[k];
    }
    return span == t.numel();
}

// The tensors of a step as pointers. Those in another layout are stepped as copies; `write_back` copies back.
struct Plan {
    Step step{};
    Tensors kept;                                    // alive until the kernels are launched
    std::vector<std::pair<Tensor, Tensor>> written;  // (the caller's, ours)

    void* in(const Tensor& order, const Tensor& t, bool writes = true) {
        if (in_order(t, order)) return writes ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
        kept.push_back(torch::stable::to(order, t.scalar_type(), {}, {}, {}, false, true));  // keeps the order
        torch::stable::copy_(kept.back(), t);
        if (writes) written.emplace_back(t, kept.back());
        return kept.back().mutable_data_ptr();
    }

    void write_back() {
        for (auto& [theirs, ours] : written) torch::stable::copy_(theirs, ours);
    }
};

Plan plan_of(const Tensors& params, const Tensors& grads, const Tensors& velocities,
             const std::vector<int64_t>& groups, const Tensors& averages, const Tensors& copies,
             const std::vector<int64_t>& copied, int64_t chunk) {
    Plan plan;
    const Tensor& first = params[0];
    std::vector<const Tensor*> halves(params.size());
    for (size_t k = 0; k < copied.size(); ++k) {
        STD_TORCH_CHECK(copied[k] >= 0 && copied[k] < int64_t(params.size()), "copied[", k, "] is not in params");
        halves[copied[k]] = &copies[k];
    }
    int64_t chunks = 0;
    for (size_t n = 0; n < params.size(); ++n) {
        const Tensor &w = params[n], &g = grads[n], &v = velocities[n];
        const Tensor *copy = halves[n], *average = averages.empty() ? nullptr : &averages[n];
        for (const Tensor* t : {&w, &g, &v, copy, average})
            STD_TORCH_CHECK(!t || alike(*t, w, first), "lars_step: tensors differ in shape or device");
        for (const Tensor* t : {&w, &v, average})
            STD_TORCH_CHECK(!t || type(*t) == type(first), "lars_step: tensors differ in dtype");
        STD_TORCH_CHECK(type(g) != NONE && (type(g) == DOUBLE) == (type(w) == DOUBLE),
                        "lars_step: gradients must have dtype float32, float16 or bfloat16; float64 where the parameters have");
        STD_TORCH_CHECK(!copy || type(*copy) == HALF || type(*copy) == BFLOAT16, "copies must be of half precision");
        Tensor order = in_order(w, w) ? w : torch::stable::empty_like(w);
        Entry e{};
        e.w = plan.in(order, w);
        e.v = plan.in(order, v);
        e.copy = copy ? plan.in(order, *copy) : nullptr;
        e.average = average ? plan.in(order, *average) : nullptr;
        e.numel = w.numel();
        e.first_chunk = chunks;
        e.chunks = (w.numel() + chunk - 1) / chunk;
        e.group = int32_t(groups[n]);
        e.grad = type(g);
        e.copied = copy ? type(*copy) : NONE;
        chunks += e.chunks;
        plan.step.entries.push_back(e);
        plan.step.grads.push_back(plan.in(order, g, false));
    }
    plan.step.count = chunks;
    return plan;
}

// `number` of a group or of the whole step, where it stands on the device.
const void* at(const std::optional<Tensor>& number, const Tensor& like, bool wide_too) {
    if (!number) return nullptr;
    bool right = type(*number) == FLOAT || (wide_too && type(*number) == DOUBLE);
    STD_TORCH_CHECK(right && number->numel() == 1 && number->device() == like.device(),
                    "lars_step: lr, weight_decay, grad_scale and found_inf must be single float32 numbers on the "
                    "parameters' device; lr and weight_decay may be float64");
    return number->const_data_ptr();
}

std::vector<Row> rows_of(const Tensor& hyper, const Numbers& lrs, const Numbers& decays, const Tensor& like) {
    std::vector<Row> rows(hyper.sizes()[0]);
    for (size_t n = 0; n < rows.size(); ++n) {
        const double* h = static_cast<const double*>(hyper.const_data_ptr()) + FIELDS * n;
        rows[n] = {h[0], h[1], h[2], h[3], at(lrs[n], like, true), at(decays[n], like, true),
                   lrs[n] ? type(*lrs[n]) : NONE, decays[n] ? type(*decays[n]) : NONE,
                   h[4] != 0, h[5] != 0, h[6] != 0, h[7] != 0, h[8] != 0};
    }
    return rows;
}

// The entries on the device, in `table`: copied only when they differ from `mirror`, as the copy keeps the host
// waiting.
void upload(const Step& step, Tensor& table, Tensor& mirror) {
    int64_t words = ENTRY * step.entries.size(), room = words + ROW * step.rows.size() + step.grads.size();
    STD_TORCH_CHECK(mirror.is_cpu() && mirror.numel() == words && table.numel() == room,
                    "lars_step: the table is of other tensors");
    if (std::memcmp(mirror.const_data_ptr(), step.entries.data(), WORD * words) == 0) return;
    std::memcpy(mirror.mutable_data_ptr(), step.entries.data(), WORD * words);
    Tensor entries = torch::stable::narrow(table, 0, 0, words);
    try {
        torch::stable::copy_(entries, mirror);
    } catch (...) {
        std::memset(mirror.mutable_data_ptr(), 0, WORD * words);
        throw;
    }
}

// hyper: [groups, 9] float64 on the CPU: lr, weight_decay, momentum, trust, adapt, nesterov, classic, lr_outside,
// maximize; lrs, decays: for each group, a number on the device in place of hyper's. groups: each tensor's row.
// copies: of params[copied[k]], in half precision. averages: of all params, or none. chunk: elements of a chunk;
// chunks: [chunks, 3] int64, of each its tensor, its first element and its end, in order. scratch: float64 [4, chunks];
// on a GPU also int64 [9 * tensors + 8 * groups + tensors], and int64 [tensors, 9] on the CPU, zero at first.
void lars_step(Tensors params, Tensors grads, Tensors velocities, std::vector<int64_t> groups, Tensor hyper,
               Numbers lrs, Numbers decays, Tensors averages, double ema, Tensors copies,
               std::vector<int64_t> copied, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
               std::optional<double> max_norm, int64_t chunk, Tensor chunks, Tensors scratch) {
    size_t n = params.size();
    bool rows = hyper.dim() == 2 && hyper.sizes()[1] == FIELDS && hyper.is_contiguous() && hyper.is_cpu();
    STD_TORCH_CHECK(rows && type(hyper) == DOUBLE, "hyper must be CPU float64 [groups, 9]");
    size_t many = hyper.sizes()[0];
    STD_TORCH_CHECK(grads.size() == n && velocities.size() == n && groups.size() == n && lrs.size() == many &&
                        decays.size() == many && (averages.empty() || averages.size() == n) &&
                        copies.size() == copied.size(),
                    "lars_step: lists differ in length");
    for (int64_t group : groups) STD_TORCH_CHECK(group >= 0 && group < int64_t(many), "groups must be rows of hyper");
    if (n == 0) return;
    bool wide = type(params[0]) == DOUBLE, cpu = params[0].is_cpu();
    STD_TORCH_CHECK(wide || type(params[0]) == FLOAT, "lars_step takes float32 and float64 parameters");
    STD_TORCH_CHECK(chunk > 0 && chunk % 4 == 0, "chunk must be a multiple of 4, got ", chunk);
    Plan plan = plan_of(params, grads, velocities, groups, averages, copies, copied, chunk);
    Step& step = plan.step;
    STD_TORCH_CHECK(chunks.numel() == 3 * step.count && chunks.is_contiguous() &&
                        chunks.scalar_type() == ScalarType::Long && chunks.device() == params[0].device() &&
                        scratch.size() == (cpu ? 1 : 3) && scratch[0].numel() == 4 * step.count &&
                        type(scratch[0]) == DOUBLE && scratch[0].device() == params[0].device(),
                    "lars_step: chunks and scratch are of other tensors");
    step.rows = rows_of(hyper, lrs, decays, params[0]);
    step.chunks = static_cast<const Chunk*>(chunks.const_data_ptr());
    step.partial = static_cast<double*>(scratch[0].mutable_data_ptr());
    step.grad_scale = static_cast<const float*>(at(grad_scale, params[0], false));
    step.found_inf = static_cast<const float*>(at(found_inf, params[0], false));
    step.max_norm = max_norm.value_or(std::numeric_limits<double>::infinity());
    step.keep = ema;
    if (cpu) {
        for (int64_t k = 0; k < step.count; ++k) {
            const Chunk& c = step.chunks[k];
            bool known = c.entry >= 0 && c.entry < int64_t(n);
            const Entry& e = step.entries[known ? c.entry : 0];
            int64_t begin = (k - e.first_chunk) * chunk;
            STD_TORCH_CHECK(known && begin >= 0 && begin < e.numel && c.begin == begin &&
                                c.end == std::min(begin + chunk, e.numel),
                            "lars_step: chunks are of other tensors");
        }
        step_cpu(step, wide);
    } else {
        torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
        void* stream = nullptr;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(params[0].get_device_index(), &stream));
        upload(step, scratch[1], scratch[2]);
        auto* table = static_cast<Entry*>(scratch[1].mutable_data_ptr());
        char* room = reinterpret_cast<char*>(table + n);
        const char* error = step_cuda(step, wide, table, room, stream);
        STD_TORCH_CHECK(!error, "lars_step: ", error);
    }
    plan.write_back();
}

}  // namespace
}  // namespace simclr_fast

STABLE_TORCH_LIBRARY(simclr_fast, m) {
    m.def(
        "lars_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] velocities, int[] groups, Tensor hyper, "
        "Tensor?[] lrs, Tensor?[] decays, Tensor(c!)[] averages, float ema, Tensor(d!)[] copies, int[] copied, "
        "Tensor? grad_scale, Tensor? found_inf, float? max_norm, int chunk, Tensor chunks, Tensor(e!)[] scratch) "
        "-> ()");
}
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) { m.impl("lars_step", TORCH_BOX(&simclr_fast::lars_step)); }
STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CUDA, m) {
    if (simclr_fast::step_cuda) m.impl("lars_step", TORCH_BOX(&simclr_fast::lars_step));
}

// An empty Python module. Python.h may not be installed, so its stable ABI's PyModuleDef is written out:
// (object header, init, index, copy), name, doc, size, and five hooks.
static const void* module_def[13] = {(void*)1, 0, 0, 0, 0, "_C", 0, (void*)-1};
extern "C" void* PyModule_Create2(void*, int);
extern "C" __attribute__((visibility("default"))) void* PyInit__C() { return PyModule_Create2(module_def, 3); }
