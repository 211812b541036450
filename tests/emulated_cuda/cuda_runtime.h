// As much of CUDA as csrc/lars.cu needs, on one CPU thread: blocks one after another, the threads of a block as
// coroutines that take turns at every __syncthreads and shuffle. launch(kernel, grid, block, arguments) starts it.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

typedef void* cudaStream_t;
typedef int cudaError_t;
inline cudaError_t cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

namespace emulated {

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done;
    int waits;  // how often it has waited: all threads of a block must agree
    double offered;
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int launches = 0;

inline void wait() {
    unsigned me = threadIdx.x;
    ++threads[me].waits;
    swapcontext(&threads[me].context, &scheduler);
    threadIdx.x = me;
}

inline void run() {
    body();
    threads[threadIdx.x].done = true;
    swapcontext(&threads[threadIdx.x].context, &scheduler);
}

template <class Kernel, class... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned block, const Arguments&... arguments) {
    constexpr size_t STACK = 1 << 17;
    ++launches;
    blockDim.x = block;
    body = [&] { kernel(arguments...); };
    threads.resize(block);
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        for (Thread& t : threads) {
            if (!t.stack) t.stack = std::make_unique<char[]>(STACK);
            t.done = false, t.waits = 0;
            getcontext(&t.context);
            t.context.uc_stack.ss_sp = t.stack.get();
            t.context.uc_stack.ss_size = STACK;
            makecontext(&t.context, run, 0);
        }
        for (size_t left = block; left > 0;) {
            for (unsigned k = 0; k < block; ++k) {
                if (threads[k].done) continue;
                threadIdx.x = k;
                swapcontext(&scheduler, &threads[k].context);
                left -= threads[k].done;
            }
            for (Thread& t : threads) {
                if (t.waits == threads[0].waits && t.done == threads[0].done) continue;
                std::fprintf(stderr, "threads of block %u wait at different places\n", blockIdx.x);
                std::abort();
            }
        }
    }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(); }

inline double __shfl_xor_sync(unsigned, double value, int lanes) {
    unsigned me = threadIdx.x;
    emulated::threads[me].offered = value;
    emulated::wait();
    double got = emulated::threads[me ^ lanes].offered;
    emulated::wait();
    return got;
}
