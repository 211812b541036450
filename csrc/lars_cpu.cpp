// The CPU kernels of LARS. See lars.h for the mathematics.
#include <torch/csrc/stable/ops.h>

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lars.h"

namespace simclr_fast {
namespace {

constexpr int64_t GRAIN = 2;  // chunks that pay for waking a thread

template <class T, class G>
struct Part {  // of a tensor: one chunk
    T *w, *v, *average;
    const G* g;
    void* copy;
    int64_t n;
};

template <class T, class G>
T wide(G g) {
    if constexpr (sizeof(G) == 2) return T(static_cast<float>(g));
    return T(g);
}

// Eight numbers, in whatever registers there are; compilers do not vectorise sums in another precision themselves.
constexpr int LANES = 8;
template <class T>
struct Lanes {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T>
using Vector = typename Lanes<T>::type;

template <class T, class G>
inline __attribute__((always_inline)) Vector<T> load(const G* from) {
    Vector<T> to;
    if constexpr (sizeof(T) == sizeof(G)) std::memcpy(&to, from, sizeof(to));
    else
        for (int k = 0; k < LANES; ++k) to[k] = wide<T>(from[k]);
    return to;
}

template <bool CLIPPED, bool CLASSIC, bool NESTEROV, class T, class G>
inline __attribute__((always_inline)) Sums sum_of(const Part<T, G>& p, Rule<T> rule) {
    rule.classic = CLASSIC, rule.nesterov = NESTEROV;  // known to the compiler
    constexpr int APART = 2;                           // sums that do not wait for each other
    constexpr int AHEAD = 2048 / sizeof(T);            // a sixth faster from memory, seen on a Xeon
    Vector<double> w[APART] = {}, x[APART] = {}, xg[APART] = {}, g[APART] = {};
    int64_t i = 0;
    for (; i + APART * LANES <= p.n; i += APART * LANES) {
        __builtin_prefetch(p.w + i + AHEAD);
        __builtin_prefetch(p.g + i + AHEAD);
        for (int k = 0; k < APART; ++k) {
            int64_t at = i + k * LANES;
            Vector<T> ws = load<T>(p.w + at), gs = load<T>(p.g + at), none = {};
            Vector<T> xs = rule.divisor(ws, CLIPPED ? none : gs, CLASSIC ? none : load<T>(p.v + at));
            auto wide_w = __builtin_convertvector(ws, Vector<double>);
            auto wide_x = __builtin_convertvector(xs, Vector<double>);
            w[k] += wide_w * wide_w;
            x[k] += wide_x * wide_x;
            if (CLIPPED) {
                auto wide_g = __builtin_convertvector(rule.scale * gs, Vector<double>);
                xg[k] += wide_x * wide_g;
                g[k] += wide_g * wide_g;
            }
        }
    }
    Sums sums;
    for (int k = 0; k < APART; ++k)
        for (int n = 0; n < LANES; ++n) sums.add({w[k][n], x[k][n], xg[k][n], g[k][n]});
    for (; i < p.n; ++i)
        sums.add(rule.template squares<CLIPPED>(p.w[i], wide<T>(p.g[i]), CLASSIC ? T(0) : p.v[i]));
    return sums;
}

template <bool CLIPPED, class T, class G>
inline __attribute__((always_inline)) Sums sum(const Part<T, G>& p, const Rule<T>& rule) {
    if (rule.classic) return sum_of<CLIPPED, true, false>(p, rule);
    return rule.nesterov ? sum_of<CLIPPED, false, true>(p, rule) : sum_of<CLIPPED, false, false>(p, rule);
}

template <class H, class T, class G>
inline __attribute__((always_inline)) void round(const Part<T, G>& p) {
    H* copy = static_cast<H*>(p.copy);
#pragma omp simd
    for (int64_t i = 0; i < p.n; ++i) copy[i] = H(float(p.w[i]));
}

template <bool NESTEROV, class T, class G>
inline __attribute__((always_inline)) void update(const Part<T, G>& p, Rule<T> rule, Factors<T> f) {
    rule.nesterov = NESTEROV;
#pragma omp simd
    for (int64_t i = 0; i < p.n; ++i) {
        T w = p.w[i], v = p.v[i];
        rule.update(w, wide<T>(p.g[i]), v, f);
        p.w[i] = w;
        p.v[i] = v;
    }
}

template <class T, class G>
inline __attribute__((always_inline)) void move(const Part<T, G>& p, const Rule<T>& rule, Factors<T> f, Type copied,
                                                T keep) {
    rule.nesterov ? update<true>(p, rule, f) : update<false>(p, rule, f);
    if (copied == HALF) round<Half>(p);
    if (copied == BFLOAT16) round<BFloat16>(p);
    if (!p.average) return;
#pragma omp simd
    for (int64_t i = 0; i < p.n; ++i) p.average[i] = p.w[i] + keep * (p.average[i] - p.w[i]);
}

// The loops above, compiled for several sets of instructions.
template <class T, class G>
struct Loops {
    Sums (*sum)(const Part<T, G>&, const Rule<T>&);
    Sums (*sum_clipped)(const Part<T, G>&, const Rule<T>&);
    void (*move)(const Part<T, G>&, const Rule<T>&, Factors<T>, Type, T);
};

#define COMPILED_FOR(NAME, ATTRIBUTE)                                                                         \
    template <bool CLIPPED, class T, class G>                                                                 \
    ATTRIBUTE Sums sum_##NAME(const Part<T, G>& p, const Rule<T>& rule) {                                       \
        return sum<CLIPPED>(p, rule);                                                                         \
    }                                                                                                         \
    template <class T, class G>                                                                               \
    ATTRIBUTE void move_##NAME(const Part<T, G>& p, const Rule<T>& rule, Factors<T> f, Type copied, T keep) {   \
        move(p, rule, f, copied, keep);                                                                       \
    }                                                                                                         \
    template <class T, class G>                                                                               \
    constexpr Loops<T, G> NAME = {sum_##NAME<false, T, G>, sum_##NAME<true, T, G>, move_##NAME<T, G>};

COMPILED_FOR(anywhere, )
#ifdef __x86_64__
COMPILED_FOR(avx2, __attribute__((target("avx2,fma,f16c"))))
COMPILED_FOR(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))))
#endif

template <class T, class G>
const Loops<T, G>& loops() {
#ifdef __x86_64__
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512) return avx512<T, G>;
    if (has_avx2) return avx2<T, G>;
#endif
    return anywhere<T, G>;
}

// Bytes of weights and gradients that stay in the caches of one thread from the norms to the update.
int64_t cached() {
    static const int64_t bytes = [] {
        int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
        return found > 0 ? found : int64_t(1) << 20;
    }();
    return bytes;
}

template <class T>
struct Stepper {
    const Step& step;
    const bool clipped = std::isfinite(step.max_norm);
    const double scale = step.grad_scale ? 1 / double(*step.grad_scale) : 1.0;
    double c = 1;
    std::vector<Sums> totals = std::vector<Sums>(step.entries.size());

    // Calls work(entry, chunk, part, loops) for the chunks of some tensors, in parallel; a thread goes through its
    // own backwards if asked to: what it read last is still in the caches.
    template <class Work>
    void each(size_t first, size_t last, bool backwards, const Work& work) const {
        const Entry& end_entry = step.entries[last - 1];
        int64_t from = step.entries[first].first_chunk, to = end_entry.first_chunk + end_entry.chunks;
        torch::stable::parallel_for(from, to, GRAIN, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                int64_t k = backwards ? begin + end - 1 - n : n;
                const Entry& e = step.entries[step.chunks[k].entry];
                if constexpr (sizeof(T) == 8) part<double>(e, k, work);
                else if (e.grad == HALF) part<Half>(e, k, work);
                else if (e.grad == BFLOAT16) part<BFloat16>(e, k, work);
                else part<float>(e, k, work);
            }
        });
    }

    template <class G, class Work>
    void part(const Entry& e, int64_t k, const Work& work) const {
        const Chunk& chunk = step.chunks[k];
        auto* g = static_cast<const G*>(step.grads[chunk.entry]) + chunk.begin;
        auto at = [&](void* tensor) { return tensor ? static_cast<T*>(tensor) + chunk.begin : nullptr; };
        void* copy = e.copy ? static_cast<Half*>(e.copy) + chunk.begin : nullptr;  // BFloat16 is as large
        work(e, k, Part<T, G>{at(e.w), at(e.v), at(e.average), g, copy, chunk.end - chunk.begin}, loops<T, G>());
    }

    // Of tensors first to last: the sums of their chunks, then of each.
    void sum(size_t first, size_t last) {
        each(first, last, false, [&](const Entry& e, int64_t k, const auto& part, const auto& loops) {
            const Row& row = step.rows[e.group];
            if (!row.adapt && !clipped) return;
            Rule<T> rule(row, scale);
            Sums sums = clipped ? loops.sum_clipped(part, rule) : loops.sum(part, rule);
            double fields[] = {sums.w, sums.x, sums.xg, sums.g};
            for (int64_t n = 0; n < 4; ++n) step.partial[n * step.count + k] = fields[n];
        });
        for (size_t n = first; n < last; ++n) {
            const Entry& e = step.entries[n];
            if (!step.rows[e.group].adapt && !clipped) continue;
            const double* at = step.partial + e.first_chunk;
            for (int64_t k = 0; k < e.chunks; ++k, ++at)
                totals[n].add({at[0], at[step.count], at[2 * step.count], at[3 * step.count]});
        }
    }

    void update(size_t first, size_t last) const {
        each(first, last, true, [&](const Entry& e, int64_t, const auto& part, const auto& loops) {
            const Row& row = step.rows[e.group];
            Factors<T> factors = Rule<T>(row, scale).factors(totals[&e - step.entries.data()], c);
            loops.move(part, Rule<T>(row, c * scale), factors, e.copied, T(step.keep));
        });
    }

    void run() {
        if (step.found_inf && *step.found_inf != 0) return;
        const size_t count = step.entries.size();
        if (clipped) {  // the norm of all gradients comes first
            sum(0, count);
            double squares = 0;
            for (const Sums& total : totals) squares += total.g;
            c = clip(squares, step.max_norm);
            return update(0, count);
        }
        int64_t limit = cached() * torch::stable::get_num_threads(), bytes = 0;
        for (size_t first = 0, n = 0; n < count; ++n) {  // as many tensors at a time as stay in the caches
            bytes += 2 * sizeof(T) * step.entries[n].numel;
            if (n + 1 < count && bytes + int64_t(2 * sizeof(T)) * step.entries[n + 1].numel <= limit) continue;
            sum(first, n + 1);
            update(first, n + 1);
            first = n + 1, bytes = 0;
        }
    }
};

}  // namespace

void step_cpu(const Step& step, bool wide) {
    if (wide) Stepper<double>{step}.run();
    else Stepper<float>{step}.run();
}

}  // namespace simclr_fast
