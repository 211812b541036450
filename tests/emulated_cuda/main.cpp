// Steps the same random models with the CUDA kernels, emulated, and with the CPU kernels, and compares them. The
// chunks of both are small, so that there are many; arrays lie at odd places, so that some are aligned and others not.
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>

#include "lars.cu"  // <<<>>> replaced

namespace sf = simclr_fast;

static std::mt19937 engine(0);
static double normal() { return std::normal_distribution<double>()(engine); }
static bool coin() { return engine() % 2; }

template <class T>
struct Array {  // on the heap, at a place that is aligned or not
    std::unique_ptr<char[]> memory;
    T* at;
    int64_t n;
    Array(int64_t n, bool aligned) : memory(new char[n * sizeof(T) + 64]), n(n) {
        char* start = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
        at = reinterpret_cast<T*>(start + (aligned ? 0 : sizeof(T)));
    }
    Array copy() const {
        bool aligned = reinterpret_cast<uintptr_t>(at) % 64 == 0;
        Array other(n, aligned);
        std::memcpy(other.at, at, n * sizeof(T));
        return other;
    }
};

template <class T>
struct Tensors {  // of one parameter
    Array<T> w, v, average;
    Array<sf::Half> copy;
    Tensors(int64_t n, bool aligned) : w(n, aligned), v(n, aligned), average(n, aligned), copy(n, aligned) {}
    Tensors duplicate() const {
        Tensors other(*this, 0);
        return other;
    }
    Tensors(const Tensors& from, int)
        : w(from.w.copy()), v(from.v.copy()), average(from.average.copy()), copy(from.copy.copy()) {}
};

template <class T>
double largest_difference(const Array<T>& a, const Array<T>& b) {
    double most = 0;
    for (int64_t i = 0; i < a.n; ++i) {
        double x = double(a.at[i]), y = double(b.at[i]);
        most = std::max(most, std::abs(x - y) / (1 + std::abs(y)));
        if (!(x == x && y == y)) most = HUGE_VAL;
    }
    return most;
}

template <class T>
double one_model(int tensors, int rows, bool clipped) {
    constexpr int64_t CHUNK = 4 * 256 * 4 + 4;
    std::vector<Tensors<T>> ours, theirs;
    std::vector<Array<double>> grads;
    std::vector<sf::Chunk> chunks;
    sf::Step step{};
    double lr = .3, found = 0;
    float scale = 8, none = 0;
    double decay = 1e-2;
    for (int r = 0; r < rows; ++r)
        step.rows.push_back({.5, .1, .9, .02, r % 3 ? nullptr : &lr, r % 2 ? nullptr : &decay, sf::DOUBLE, sf::DOUBLE,
                             r % 5 != 4, coin(), coin(), coin(), coin()});
    bool averaged = coin();
    for (int k = 0; k < tensors; ++k) {
        int64_t n = tensors > 100 ? engine() % 100 / 97 : engine() % 20000 / (1 << engine() % 12);  // many: mostly empty
        bool aligned = coin(), halved = sizeof(T) == 4 && coin();
        sf::Entry e{};
        e.numel = n, e.group = engine() % rows, e.first_chunk = int64_t(chunks.size());
        e.chunks = (n + CHUNK - 1) / CHUNK;
        e.grad = sizeof(T) == 8 ? sf::DOUBLE : std::vector{sf::FLOAT, sf::HALF, sf::BFLOAT16}[engine() % 3];
        e.copied = halved ? coin() ? sf::HALF : sf::BFLOAT16 : sf::NONE;
        for (int64_t c = 0; c < e.chunks; ++c) chunks.push_back({k, c * CHUNK, std::min(n, (c + 1) * CHUNK)});
        ours.emplace_back(n, aligned);
        grads.emplace_back(n, true);
        for (int64_t i = 0; i < n; ++i) {
            ours[k].w.at[i] = T(normal()), ours[k].v.at[i] = T(normal()), ours[k].average.at[i] = T(normal());
            ours[k].copy.at[i] = sf::Half(0);
            double g = normal();
            if (e.grad == sf::DOUBLE) grads[k].at[i] = g;
            if (e.grad == sf::FLOAT) reinterpret_cast<float*>(grads[k].at)[i] = float(g);
            if (e.grad == sf::HALF) reinterpret_cast<sf::Half*>(grads[k].at)[i] = sf::Half(float(g));
            if (e.grad == sf::BFLOAT16) reinterpret_cast<sf::BFloat16*>(grads[k].at)[i] = sf::BFloat16(float(g));
        }
        step.entries.push_back(e);
        step.grads.push_back(grads[k].at);
    }
    for (const Tensors<T>& t : ours) theirs.push_back(t.duplicate());
    auto point = [&](std::vector<Tensors<T>>& to) {
        for (int k = 0; k < tensors; ++k) {
            sf::Entry& e = step.entries[k];
            e.w = to[k].w.at, e.v = to[k].v.at, e.average = averaged ? to[k].average.at : nullptr;
            e.copy = e.copied == sf::NONE ? nullptr : to[k].copy.at;
        }
    };
    std::vector<double> partial(4 * chunks.size(), std::numeric_limits<double>::quiet_NaN());
    step.chunks = chunks.data(), step.count = int64_t(chunks.size()), step.partial = partial.data();
    step.grad_scale = coin() ? &scale : nullptr, step.found_inf = coin() ? &none : nullptr;
    step.max_norm = clipped ? .7 : HUGE_VAL, step.keep = .9;
    std::vector<char> room(step.rows.size() * sizeof(sf::Row) + tensors * sizeof(void*));

    point(theirs);
    sf::step_cpu(step, sizeof(T) == 8);
    point(ours);
    emulated::launches = 0;
    if (const char* error = sf::step_cuda(step, sizeof(T) == 8, step.entries.data(), room.data(), nullptr))
        std::printf("error %s\n", error);
    int expected = room.size() <= 32000 ? 2 : 2 + int((room.size() + 31999) / 32000);
    double most = chunks.empty() || emulated::launches == expected ? found : HUGE_VAL;
    for (int k = 0; k < tensors; ++k) {
        most = std::max({most, largest_difference(ours[k].w, theirs[k].w), largest_difference(ours[k].v, theirs[k].v),
                         largest_difference(ours[k].average, theirs[k].average)});
        for (int64_t i = 0; i < ours[k].copy.n; ++i)  // a weight off by rounding may round to the next
            if (std::abs(int(ours[k].copy.at[i].x) - int(theirs[k].copy.at[i].x)) > 1) most = HUGE_VAL;
    }

    const float inf = 1;  // nothing changes
    step.found_inf = &inf;
    std::vector<Tensors<T>> before;
    for (const Tensors<T>& t : ours) before.push_back(t.duplicate());
    sf::step_cuda(step, sizeof(T) == 8, step.entries.data(), room.data(), nullptr);
    for (int k = 0; k < tensors; ++k)
        if (std::memcmp(before[k].w.at, ours[k].w.at, ours[k].w.n * sizeof(T)) ||
            std::memcmp(before[k].v.at, ours[k].v.at, ours[k].v.n * sizeof(T)))
            most = HUGE_VAL;
    return most;
}

int main() {
    double single = 0, twice = 0;
    for (int round = 0; round < 8; ++round) {
        single = std::max(single, one_model<float>(1 + round, 1 + round % 6, round % 3 == 0));
        twice = std::max(twice, one_model<double>(1 + round, 1 + round % 6, round % 3 == 0));
    }
    single = std::max(single, one_model<float>(700, 3, true));    // more than small arguments hold
    single = std::max(single, one_model<float>(4500, 300, true));  // more than any arguments hold
    std::printf("%g %g\n", single, twice);
    return !(single < 1e-6 && twice < 1e-14);
}
