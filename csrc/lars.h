// LARS (arXiv:1708.03888) the way google-research/simclr steps it: what the CPU and the CUDA code share.
//
// For each tensor, with the gradient d = s * g + weight_decay * w, the momentum m and the trust ratio r:
//     classic     r = trust * |w| / |d|    v <- m * v + lr * r * d    w <- w - u
//     lr_outside  r = trust * |w| / |d|    v <- m * v + r * d         w <- w - lr * u
//     popular     r = trust * |w| / |u|    v <- m * v + d             w <- w - lr * r * u
// where u is the new v or, with Nesterov, its formula applied once more; r is 1 where the tensor is not
// adapted or a norm is 0. All three are v <- m * v + a * d, w <- w - b * u: only the factors a and b differ.
// s is 1, over the scale of a scaled loss, times the factor c that clips all gradients to one norm, negative to
// maximise. What r divides by is p + c * q, p without the gradient and q linear in it: as c is known only after
// the norms, |p|^2, <p, q> and |g|^2 are summed then.
//
// A tensor is cut into chunks. Squares are summed chunk by chunk, and the sums of the chunks in a fixed
// order, so that a result depends neither on the number of threads nor on their timing.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace simclr_fast {

using c10::BFloat16;
using c10::Half;

enum Type : int32_t { NONE, FLOAT, DOUBLE, HALF, BFLOAT16 };

struct Sums {  // over w^2 and what r divides by; clipped: w^2, p^2, p * s * g and (s * g)^2, s without c
    double w = 0, x = 0, xg = 0, g = 0;
    C10_HOST_DEVICE void add(const Sums& more) { w += more.w, x += more.x, xg += more.xg, g += more.g; }
};

struct Row {  // a parameter group: its numbers, or where on the device they stand
    double lr, weight_decay, momentum, trust;
    const void *lr_at, *decay_at;
    Type lr_type, decay_type;
    bool adapt, nesterov, classic, lr_outside, maximize;

    C10_HOST_DEVICE static double read(double value, const void* at, Type type) {
        if (!at) return value;
        return type == DOUBLE ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
    }
};

struct Entry {  // one tensor; all are dense and in the same order
    void *w, *v, *copy, *average;  // copy: w in half precision, or null; average: of w over the steps, or null
    int64_t numel, first_chunk, chunks;
    int32_t group;
    Type grad, copied;
    int32_t unused;
};

struct Chunk {
    int64_t entry, begin, end;
};

struct Step {
    std::vector<Entry> entries;
    std::vector<const void*> grads;
    std::vector<Row> rows;
    const Chunk* chunks;  // where the tensors are, like all pointers below
    int64_t count;        // of chunks
    double* partial;      // four of each chunk: Sums, a field at a time
    const float *grad_scale, *found_inf;
    double max_norm, keep;  // max_norm: infinite if none; keep: of an average
};

template <class T>
struct Factors {
    T a, b;
};

template <class T>
struct Rule {  // a parameter group's step of one element
    T lr, weight_decay, momentum, trust, scale;
    bool adapt, nesterov, classic, lr_outside;

    // The same with pointers followed; scale: s.
    C10_HOST_DEVICE Rule(const Row& row, double s)
        : lr(T(Row::read(row.lr, row.lr_at, row.lr_type))),
          weight_decay(T(Row::read(row.weight_decay, row.decay_at, row.decay_type))),
          momentum(T(row.momentum)),
          trust(T(row.trust)),
          scale(T(row.maximize ? -s : s)),
          adapt(row.adapt),
          nesterov(row.nesterov),
          classic(row.classic),
          lr_outside(row.lr_outside) {}

    // Moves the velocity of an element, or of several in a vector (hence inline: how vectors are passed differs
    // between instruction sets), and returns its u.
    template <class X>
    C10_HOST_DEVICE C10_ALWAYS_INLINE X move(X& velocity, X d, T a) const {
        velocity = momentum * velocity + a * d;
        if (nesterov) return momentum * velocity + a * d;
        return velocity;
    }

    // What r divides by; without the gradient if g is 0.
    template <class X>
    C10_HOST_DEVICE C10_ALWAYS_INLINE X divisor(X w, X g, X v) const {
        X d = scale * g + weight_decay * w;
        if (classic) return d;
        return move(v, d, T(1));
    }

    template <bool CLIPPED>
    C10_HOST_DEVICE Sums squares(T w, T g, T v) const {
        double x = divisor(w, CLIPPED ? T(0) : g, v), q = CLIPPED ? scale * g : T(0), wide = w;
        return {wide * wide, x * x, CLIPPED ? x * q : 0.0, q * q};  // x may be infinite
    }

    C10_HOST_DEVICE Factors<T> factors(const Sums& sums, double c) const {
        double q = c * (!classic && nesterov ? 1 + double(momentum) : 1);
        double w_norm = sqrt(sums.w), x_norm = sqrt(fmax(sums.x + q * (2 * sums.xg + q * sums.g), 0.0));
        T ratio = adapt && w_norm > 0 && x_norm > 0 ? T(trust * w_norm / x_norm) : T(1);
        if (!classic) return {T(1), lr * ratio};
        return lr_outside ? Factors<T>{ratio, lr} : Factors<T>{lr * ratio, T(1)};
    }

    C10_HOST_DEVICE void update(T& w, T g, T& v, Factors<T> f) const {
        w -= f.b * move(v, scale * g + weight_decay * w, f.a);
    }
};

// The factor that brings gradients of that squared norm to max_norm, as torch.nn.utils.clip_grad_norm_ has it.
C10_HOST_DEVICE inline double clip(double squares, double max_norm) {
    double c = max_norm / (sqrt(squares) + 1e-6);
    return c < 1 || c != c ? c : 1.0;
}

void step_cpu(const Step& step, bool wide);  // wide: float64 tensors

// Steps tensors on the current GPU. table: the entries on the device; room: space there for rows and pointers.
// Returns an error text or null. Weak: it is null itself where the extension was built without CUDA.
__attribute__((weak)) const char* step_cuda(const Step& step, bool wide, const Entry* table, char* room, void* stream);

}  // namespace simclr_fast
