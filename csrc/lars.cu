// The CUDA kernels of LARS: two launches for every 480 tensors or so, no atomics, nothing the host waits for.
// See lars.h for the mathematics.
#include <cuda_runtime.h>

#include <algorithm>

#include "lars.h"

namespace simclr_fast {
namespace {

constexpr int THREADS = 256;

struct Table {  // travels as a kernel argument, so that there is no copy to the device
    static constexpr size_t SIZE = 32 * 1000 / sizeof(Entry<float>);  // arguments may take 32764 bytes
    Entry<float> entries[SIZE];
    int count;

    __device__ const Entry<float>& find(int64_t chunk) const {
        int low = 0, high = count;  // entries[low].first_chunk <= chunk < entries[high].first_chunk
        while (high - low > 1) {
            int middle = (low + high) / 2;
            (entries[middle].first_chunk <= chunk ? low : high) = middle;
        }
        return entries[low];
    }
};

// Adds over the block in a fixed order; every thread gets the sum.
__device__ Norms block_sum(Norms mine) {
    __shared__ Norms warps[THREADS / 32];
    for (int offset = 16; offset > 0; offset /= 2)
        mine.add({__shfl_xor_sync(~0u, mine.w, offset), __shfl_xor_sync(~0u, mine.x, offset)});
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    Norms sum;
    for (Norms warp : warps) sum.add(warp);
    return sum;
}

// A block owns a chunk and writes its sums of squares. Reads w and g once, v too if popular.
__global__ void __launch_bounds__(THREADS) norms_kernel(const __grid_constant__ Table table, Norms* partial) {
    int64_t chunk = table.entries[0].first_chunk + blockIdx.x;
    const Entry<float>& e = table.find(chunk);
    if (!e.adapt) return;
    int64_t begin = (chunk - e.first_chunk) * CHUNK, end = min(begin + CHUNK, e.numel);
    Norms mine;
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) {
        double w = e.w[i], x = e.divisor(i);
        mine.add({w * w, x * x});
    }
    Norms sum = block_sum(mine);
    if (threadIdx.x == 0) partial[chunk] = sum;
}

// A block owns a chunk: it adds up the sums of the tensor's chunks, then reads w, g, v and writes w, v once.
__global__ void __launch_bounds__(THREADS) update_kernel(const __grid_constant__ Table table, const Norms* partial) {
    int64_t chunk = table.entries[0].first_chunk + blockIdx.x;
    const Entry<float>& e = table.find(chunk);
    Norms mine;
    for (int64_t k = threadIdx.x; e.adapt && k < e.chunks(); k += THREADS) mine.add(partial[e.first_chunk + k]);
    Factors<float> f = e.factors(block_sum(mine));
    int64_t begin = (chunk - e.first_chunk) * CHUNK, end = min(begin + CHUNK, e.numel);
    for (int64_t i = begin + threadIdx.x; i < end; i += THREADS) e.update(i, f);
}

}  // namespace

const char* launch_cuda(const Entry<float>* entries, size_t count, Norms* partial, void* stream) {
    for (size_t first = 0; first < count; first += Table::SIZE) {
        Table table;
        table.count = int(std::min(Table::SIZE, count - first));
        std::copy_n(entries + first, table.count, table.entries);
        const Entry<float>& last = table.entries[table.count - 1];
        unsigned blocks = unsigned(last.first_chunk + last.chunks() - entries[first].first_chunk);
        norms_kernel<<<blocks, THREADS, 0, cudaStream_t(stream)>>>(table, partial);
        update_kernel<<<blocks, THREADS, 0, cudaStream_t(stream)>>>(table, partial);
        if (cudaError_t error = cudaGetLastError()) return cudaGetErrorString(error);
    }
    return nullptr;
}

}  // namespace simclr_fast
