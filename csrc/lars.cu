// The CUDA kernels of LARS: two launches whatever the number of tensors, no atomics, nothing the host waits for.
// See lars.h for the mathematics.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "lars.h"

namespace simclr_fast {
namespace {

constexpr int THREADS = 256, LANE = 4, DEEP = 2;  // a thread has LANE * DEEP elements of each tensor in flight
template <class T>
constexpr int BLOCKS = sizeof(T) == 8 ? 2 : 3;  // at least, of a multiprocessor

// Travels as a kernel argument, so that nothing is copied to the device and a CUDA graph remembers it.
template <int BYTES>
struct Arguments {
    const Entry* table;
    const Chunk* chunks;
    int64_t count;
    double* partial;
    const float *grad_scale, *found_inf;
    double max_norm, keep;
    const char* stored;  // rows and pointers, where they are too many for `bytes`
    int64_t rows;
    alignas(8) char bytes[BYTES];  // the rows, then a pointer to each tensor's gradient

    __device__ const Row& row(const Entry& e) const {
        return reinterpret_cast<const Row*>(stored ? stored : bytes)[e.group];
    }
    __device__ const void* grad(int64_t entry) const {
        return reinterpret_cast<const void* const*>((stored ? stored : bytes) + rows * sizeof(Row))[entry];
    }
    __device__ double scale() const { return grad_scale ? 1 / double(*grad_scale) : 1.0; }
    __device__ bool skipped() const { return found_inf && *found_inf != 0; }
};

template <class S>
struct alignas(LANE * sizeof(S) < 16 ? LANE * sizeof(S) : 16) Lane {
    S x[LANE];
};

template <class T, class G>
__device__ T wide(G g) {
    if constexpr (sizeof(G) == 2) return T(static_cast<float>(g));
    else return T(g);
}

// Elements begin to end of tensors, `Work::lanes` several at a time, where all are aligned, and `Work::one`.
template <class Work>
__device__ void walk(int64_t begin, int64_t end, bool aligned, Work& work) {
    int64_t even = aligned ? begin + (end - begin) / LANE * LANE : begin;
    constexpr int64_t SPAN = THREADS * LANE * DEEP;
    for (int64_t i = begin + threadIdx.x * LANE; i < even; i += SPAN) work.lanes(i, even);
    for (int64_t i = even + threadIdx.x; i < end; i += THREADS) work.one(i);
}

// Adds over the block in a fixed order; every thread gets the sum.
__device__ Sums block_sum(Sums mine) {
    __shared__ Sums warps[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2)
        mine.add({__shfl_xor_sync(~0u, mine.w, offset), __shfl_xor_sync(~0u, mine.x, offset),
                  __shfl_xor_sync(~0u, mine.xg, offset), __shfl_xor_sync(~0u, mine.g, offset)});
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Sums sum;
    for (const Sums& warp : warps) sum.add(warp);
    return sum;
}

template <bool CLIPPED, class T, class G>
struct Norms {
    const T *w, *v;
    const G* g;
    Rule<T> rule;
    Sums sums;

    __device__ void one(int64_t i) {
        sums.add(rule.template squares<CLIPPED>(w[i], wide<T>(g[i]), rule.classic ? T(0) : v[i]));
    }
    __device__ void lanes(int64_t start, int64_t end) {
        Lane<T> ws[DEEP], vs[DEEP] = {};
        Lane<G> gs[DEEP];
#pragma unroll
        for (int k = 0; k < DEEP; ++k) {
            int64_t i = start + k * THREADS * LANE;
            if (i >= end) break;
            ws[k] = *reinterpret_cast<const Lane<T>*>(w + i);
            gs[k] = *reinterpret_cast<const Lane<G>*>(g + i);
            if (!rule.classic) vs[k] = *reinterpret_cast<const Lane<T>*>(v + i);
        }
#pragma unroll
        for (int k = 0; k < DEEP; ++k) {
            if (start + k * THREADS * LANE >= end) break;
#pragma unroll
            for (int n = 0; n < LANE; ++n)
                sums.add(rule.template squares<CLIPPED>(ws[k].x[n], wide<T>(gs[k].x[n]), vs[k].x[n]));
        }
    }
};

template <class T, class G>
struct Update {
    T *w, *v, *average;
    const G* g;
    void* copy;
    Type copied;
    T keep;
    Rule<T> rule;
    Factors<T> factors;

    template <class H>
    __device__ static void round(void* copy, int64_t i, const Lane<T>& from) {
        Lane<H> to;
#pragma unroll
        for (int n = 0; n < LANE; ++n) to.x[n] = H(float(from.x[n]));
        *reinterpret_cast<Lane<H>*>(static_cast<H*>(copy) + i) = to;
    }

    __device__ void one(int64_t i) {
        rule.update(w[i], wide<T>(g[i]), v[i], factors);
        if (copied == HALF) static_cast<Half*>(copy)[i] = Half(float(w[i]));
        if (copied == BFLOAT16) static_cast<BFloat16*>(copy)[i] = BFloat16(float(w[i]));
        if (average) average[i] = w[i] + keep * (average[i] - w[i]);
    }
    __device__ void lanes(int64_t start, int64_t end) {
        Lane<T> ws[DEEP], vs[DEEP], as[DEEP];
        Lane<G> gs[DEEP];
#pragma unroll
        for (int k = 0; k < DEEP; ++k) {
            int64_t i = start + k * THREADS * LANE;
            if (i >= end) break;
            ws[k] = *reinterpret_cast<const Lane<T>*>(w + i);
            gs[k] = *reinterpret_cast<const Lane<G>*>(g + i);
            vs[k] = *reinterpret_cast<const Lane<T>*>(v + i);
            if (average) as[k] = *reinterpret_cast<const Lane<T>*>(average + i);
        }
#pragma unroll
        for (int k = 0; k < DEEP; ++k) {
            int64_t i = start + k * THREADS * LANE;
            if (i >= end) break;
#pragma unroll
            for (int n = 0; n < LANE; ++n) {
                rule.update(ws[k].x[n], wide<T>(gs[k].x[n]), vs[k].x[n], factors);
                if (average) as[k].x[n] = ws[k].x[n] + keep * (as[k].x[n] - ws[k].x[n]);
            }
            *reinterpret_cast<Lane<T>*>(w + i) = ws[k];
            *reinterpret_cast<Lane<T>*>(v + i) = vs[k];
            if (average) *reinterpret_cast<Lane<T>*>(average + i) = as[k];
            if (copied == HALF) round<Half>(copy, i, ws[k]);
            if (copied == BFLOAT16) round<BFloat16>(copy, i, ws[k]);
        }
    }
};

__device__ bool aligned(const Entry& e, const void* g) {
    auto bits = reinterpret_cast<uintptr_t>(e.w) | reinterpret_cast<uintptr_t>(e.v) |
                reinterpret_cast<uintptr_t>(e.average) | reinterpret_cast<uintptr_t>(e.copy) |
                reinterpret_cast<uintptr_t>(g);
    return bits % 16 == 0;
}

template <bool CLIPPED, class T, class G>
__device__ Sums norms_of(const Entry& e, const Chunk& chunk, const void* g, const Rule<T>& rule) {
    Norms<CLIPPED, T, G> work{static_cast<T*>(e.w), static_cast<T*>(e.v), static_cast<const G*>(g), rule, {}};
    walk(chunk.begin, chunk.end, aligned(e, g), work);
    return work.sums;
}

// A block owns a chunk and writes its sums of squares. Reads w and g once, v too if popular.
template <class T, bool CLIPPED, int BYTES>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) norms_kernel(const __grid_constant__ Arguments<BYTES> args) {
    const Chunk chunk = args.chunks[blockIdx.x];
    const Entry& e = args.table[chunk.entry];
    const Row& row = args.row(e);
    if (args.skipped() || (!row.adapt && !CLIPPED)) return;
    const void* g = args.grad(chunk.entry);
    const Rule<T> rule(row, args.scale());
    Sums mine;
    if constexpr (sizeof(T) == 8) mine = norms_of<CLIPPED, T, double>(e, chunk, g, rule);
    else if (e.grad == HALF) mine = norms_of<CLIPPED, T, Half>(e, chunk, g, rule);
    else if (e.grad == BFLOAT16) mine = norms_of<CLIPPED, T, BFloat16>(e, chunk, g, rule);
    else mine = norms_of<CLIPPED, T, float>(e, chunk, g, rule);
    Sums sum = block_sum(mine);
    if (threadIdx.x > 0) return;
    double* to = args.partial + blockIdx.x;
    to[0] = sum.w, to[args.count] = sum.x;
    if constexpr (CLIPPED) to[2 * args.count] = sum.xg, to[3 * args.count] = sum.g;
}

template <class T, class G>
__device__ void update_of(const Entry& e, const Chunk& chunk, const void* g, T keep, const Rule<T>& rule, Factors<T> f) {
    Update<T, G> work{static_cast<T*>(e.w), static_cast<T*>(e.v), static_cast<T*>(e.average),
                      static_cast<const G*>(g), e.copy, e.copied, keep, rule, f};
    walk(chunk.begin, chunk.end, aligned(e, g), work);
}

// A block owns a chunk: it adds up the sums of the tensor's chunks, if clipped those of all, then reads w, g and v
// and writes w and v once. Backwards: what the norms read last is still in the L2 cache.
template <class T, int BYTES>
__global__ void __launch_bounds__(THREADS, BLOCKS<T>) update_kernel(const __grid_constant__ Arguments<BYTES> args) {
    if (args.skipped()) return;
    const Chunk chunk = args.chunks[args.count - 1 - blockIdx.x];
    const Entry& e = args.table[chunk.entry];
    const Row& row = args.row(e);
    const double *w = args.partial, *x = w + args.count, *xg = x + args.count, *all = xg + args.count;
    const bool clipped = args.max_norm < HUGE_VAL;
    double c = 1;
    if (clipped) {
        Sums mine;
        for (int64_t k = threadIdx.x; k < args.count; k += THREADS) mine.g += all[k];
        c = clip(block_sum(mine).g, args.max_norm);
    }
    Sums mine;
    int64_t last = row.adapt ? e.first_chunk + e.chunks : 0;
    for (int64_t k = e.first_chunk + threadIdx.x; k < last; k += THREADS)
        mine.add(clipped ? Sums{w[k], x[k], xg[k], all[k]} : Sums{w[k], x[k], 0, 0});
    Factors<T> f = Rule<T>(row, args.scale()).factors(block_sum(mine), c);
    const Rule<T> rule(row, c * args.scale());
    const void* g = args.grad(chunk.entry);
    T keep = T(args.keep);
    if constexpr (sizeof(T) == 8) update_of<T, double>(e, chunk, g, keep, rule, f);
    else if (e.grad == HALF) update_of<T, Half>(e, chunk, g, keep, rule, f);
    else if (e.grad == BFLOAT16) update_of<T, BFloat16>(e, chunk, g, keep, rule, f);
    else update_of<T, float>(e, chunk, g, keep, rule, f);
}

constexpr int SMALL = 3968, LARGE = 32000;  // of the 32764 bytes that arguments may take

struct Bytes {
    char bytes[LARGE];
};

__global__ void store_kernel(const __grid_constant__ Bytes from, char* to, int size) {
    for (int k = threadIdx.x; k < size; k += blockDim.x) to[k] = from.bytes[k];
}

template <class T, int BYTES>
void launch(const Step& step, const Entry* table, const char* stored, const std::vector<char>& packed,
            cudaStream_t stream) {
    Arguments<BYTES> args{table, step.chunks, step.count, step.partial, step.grad_scale, step.found_inf,
                          step.max_norm, step.keep, stored, int64_t(step.rows.size()), {}};
    if (!stored) std::memcpy(args.bytes, packed.data(), packed.size());
    auto* norms = step.max_norm < HUGE_VAL ? norms_kernel<T, true, BYTES> : norms_kernel<T, false, BYTES>;
    norms<<<unsigned(step.count), THREADS, 0, stream>>>(args);
    update_kernel<T, BYTES><<<unsigned(step.count), THREADS, 0, stream>>>(args);
}

template <class T>
void pack_and_launch(const Step& step, const Entry* table, char* room, cudaStream_t stream) {
    size_t rows = step.rows.size() * sizeof(Row), grads = step.grads.size() * sizeof(void*);
    std::vector<char> packed(rows + grads);
    std::memcpy(packed.data(), step.rows.data(), rows);
    std::memcpy(packed.data() + rows, step.grads.data(), grads);
    if (packed.size() <= LARGE) {
        bool small = packed.size() <= SMALL && sizeof(T) == 4;
        auto* run = small ? launch<T, sizeof(T) == 4 ? SMALL : LARGE> : launch<T, LARGE>;
        return run(step, table, nullptr, packed, stream);
    }
    for (size_t first = 0; first < packed.size(); first += LARGE) {
        Bytes bytes;
        int size = int(std::min(packed.size() - first, size_t(LARGE)));
        std::memcpy(bytes.bytes, packed.data() + first, size);
        store_kernel<<<1, 1024, 0, stream>>>(bytes, room + first, size);
    }
    launch<T, LARGE>(step, table, room, packed, stream);
}

}  // namespace

const char* step_cuda(const Step& step, bool wide, const Entry* table, char* room, void* stream) {
    if (step.count == 0) return nullptr;
    (wide ? pack_and_launch<double> : pack_and_launch<float>)(step, table, room, cudaStream_t(stream));
    cudaError_t error = cudaGetLastError();
    return error ? cudaGetErrorString(error) : nullptr;
}

}  // namespace simclr_fast
