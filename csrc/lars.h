// LARS (arXiv:1708.03888) the way google-research/simclr steps it: what the CPU and the CUDA code share.
//
// For each tensor, with the gradient d = g + weight_decay * w, the momentum m and the trust ratio r:
//     classic     r = trust * |w| / |d|    v <- m * v + lr * r * d    w <- w - u
//     lr_outside  r = trust * |w| / |d|    v <- m * v + r * d         w <- w - lr * u
//     popular     r = trust * |w| / |u|    v <- m * v + d             w <- w - lr * r * u
// where u is the new v or, with Nesterov, its formula applied once more; r is 1 where the tensor is not
// adapted or a norm is 0. All three are v <- m * v + a * d, w <- w - b * u: only the factors a and b differ.
//
// A tensor is cut into chunks. Squares are summed chunk by chunk, and the sums of the chunks in a fixed
// order, so that a result depends neither on the number of threads nor on their timing.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace simclr_fast {

constexpr int64_t CHUNK = 16384;  // elements

struct Norms {  // sums of squares: of w, and of what r divides by
    double w = 0, x = 0;
    C10_HOST_DEVICE void add(Norms more) { w += more.w, x += more.x; }
};

template <class T>
struct Factors {
    T a, b;
};

template <class T>
struct Entry {  // one tensor; w, g and v are dense and in the same order
    T *w, *g, *v;
    int64_t numel, first_chunk;
    T lr, weight_decay, momentum, trust;
    bool adapt, nesterov, classic, lr_outside;

    C10_HOST_DEVICE int64_t chunks() const { return (numel + CHUNK - 1) / CHUNK; }

    // Moves the velocity of one element and returns its u.
    C10_HOST_DEVICE T move(T& velocity, T d, T a) const {
        velocity = momentum * velocity + a * d;
        return nesterov ? momentum * velocity + a * d : velocity;
    }

    // Element i of the tensor by whose norm r divides.
    C10_HOST_DEVICE T divisor(int64_t i) const {
        T d = g[i] + weight_decay * w[i], velocity = classic ? T(0) : v[i];
        return classic ? d : move(velocity, d, T(1));
    }

    C10_HOST_DEVICE Factors<T> factors(Norms squares) const {
        double w_norm = sqrt(squares.w), x_norm = sqrt(squares.x);
        T ratio = adapt && w_norm > 0 && x_norm > 0 ? T(trust * w_norm / x_norm) : T(1);
        if (!classic) return {T(1), lr * ratio};
        return lr_outside ? Factors<T>{ratio, lr} : Factors<T>{lr * ratio, T(1)};
    }

    C10_HOST_DEVICE void update(int64_t i, Factors<T> f) const {
        T velocity = v[i];
        w[i] -= f.b * move(velocity, g[i] + weight_decay * w[i], f.a);
        v[i] = velocity;
    }
};

// Steps `count` tensors on the current GPU; partial: room for the Norms of every chunk. Returns an error text
// or null. Weak: it is null itself where the extension was built without CUDA.
__attribute__((weak)) const char* launch_cuda(const Entry<float>*, size_t count, Norms* partial, void* stream);

}  // namespace simclr_fast
