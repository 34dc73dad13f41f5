// The CPU kernels on tiles. This unit is compiled once for each instruction set, with MGD_ISA naming the namespace of
// its one exported function; everything else has internal linkage.

#include "optim/cpu.h"
#include "optim/simd.h"
// The rules come after simd.h, which declares `root` for vector registers.
#include "optim/adam.h"
#include "optim/sgd.h"

namespace mgd {
namespace {

// States of a replay stay in the first-level cache over all steps: 3 x 8 KiB in float32.
constexpr int64_t kReplayTile = 2048;
static_assert(kTile % kReplayTile == 0 && kReplayTile % kLanes == 0);

// Registers that one pass over kLanes elements takes, and registers of doubles that hold kLanes.
template <class T>
constexpr int kPacks = kLanes / Pack<T>::width;
constexpr int kDoublePacks = kLanes / Pack<double>::width;

// Adds products to the virtual lanes, in double; lane order is that of memory, whatever the register width.
template <class T>
struct LaneSums;

template <>
struct LaneSums<double> {
    DoublePack (*lanes)[kDoublePacks];
    int at;
    MGD_HD LaneSums make(DoublePack (*lanes)[kDoublePacks], int pack) { return {lanes, pack}; }
    inline __attribute__((always_inline)) void add(int i, DoublePack x) const { lanes[i][at] += x; }
    inline __attribute__((always_inline)) void add(int i, DoublePack x, DoublePack y) const { lanes[i][at] += x * y; }
};

template <>
struct LaneSums<float> {
    DoublePack (*lanes)[kDoublePacks];
    int at;
    MGD_HD LaneSums make(DoublePack (*lanes)[kDoublePacks], int pack) { return {lanes, 2 * pack}; }
    inline __attribute__((always_inline)) void add(int i, FloatPack x) const {
        const Widened wide = widen(x);
        lanes[i][at] += wide.low;
        lanes[i][at + 1] += wide.high;
    }
    inline __attribute__((always_inline)) void add(int i, FloatPack x, FloatPack y) const {
        const Widened a = widen(x), b = widen(y);
        lanes[i][at] += a.low * b.low;
        lanes[i][at + 1] += a.high * b.high;
    }
};

double in_order(const DoublePack* lanes) {
    double all[kLanes], sum = 0;
    __builtin_memcpy(all, lanes, sizeof all);
    for (int lane = 0; lane < kLanes; ++lane) sum += all[lane];
    return sum;
}

// A copy of the last, incomplete kLanes elements, padded with zeros (zeros add nothing to any sum).
template <class T>
struct Padded {
    alignas(64) T values[kLanes] = {};
    Padded() = default;
    Padded(const T* from, int64_t count) {
        for (int64_t i = 0; i < count; ++i) values[i] = from[i];
    }
    void write(T* to, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) to[i] = values[i];
    }
};

template <class R, class T, class G>
struct Over {
    static constexpr int tensors = R::slots + 1;
    using V = typename Pack<T>::type;
    using Coefficients = typename R::template Coefficients<T>;

    static Coefficients coefficients(const Task& task, int64_t step, int64_t group) {
        return static_cast<const Coefficients*>(task.coefficients)[step * task.groups + group];
    }

    MGD_HD void step_lanes(const Coefficients& c, T* const* state, const G* grad) {
#pragma GCC unroll 8
        for (int j = 0; j < kPacks<T>; ++j) {
            const int at = j * Pack<T>::width;
            V s[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) s[i] = load<V>(state[i] + at);
            R::step(c, load_as(grad + at, V{}), s);
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) store(state[i] + at, s[i]);
        }
    }

    static void step(const Coefficients& c, T* const* state, const G* grad, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) {
            T* here[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) here[i] = state[i] + at;
            step_lanes(c, here, grad + at);
        }
        if (at == count) return;
        Padded<T> last[tensors];
        T* here[tensors];
        for (int i = 0; i < tensors; ++i) {
            last[i] = Padded<T>(state[i] + at, count - at);
            here[i] = last[i].values;
        }
        step_lanes(c, here, Padded<G>(grad + at, count - at).values);
        for (int i = 0; i < tensors; ++i) last[i].write(state[i] + at, count - at);
    }

    static void replay(const Task& task, int64_t group, int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at += kReplayTile) {
            const int64_t count = end - at < kReplayTile ? end - at : kReplayTile;
            T* state[tensors];
            for (int i = 0; i < tensors; ++i) state[i] = static_cast<T*>(task.state[i]) + at;
            for (int64_t k = 0; k < task.steps; ++k)
                step(coefficients(task, k, group), state, static_cast<const G*>(task.grads[k]) + at, count);
        }
    }

    template <bool Stream>
    MGD_HD void vjp_lanes(const Coefficients& c, const T* const* state, const G* grad, T* const* adjoint, T* u,
                          DoublePack (*lanes)[kDoublePacks]) {
#pragma GCC unroll 8
        for (int j = 0; j < kPacks<T>; ++j) {
            const int at = j * Pack<T>::width;
            V s[tensors], a[tensors], cotangent;
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) {
                s[i] = load<V>(state[i] + at);
                a[i] = load<V>(adjoint[i] + at);
            }
            R::vjp(c, load_as(grad + at, V{}), s, a, cotangent, LaneSums<T>::make(lanes, j));
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) store(adjoint[i] + at, a[i]);
            if (Stream)
                stream(u + at, cotangent);
            else
                store(u + at, cotangent);
        }
    }

    template <bool Stream>
    static void vjp_lanes_of_tile(const Coefficients& c, const T* const* state, const G* grad, T* const* adjoint, T* u,
                                  int64_t count, DoublePack (*lanes)[kDoublePacks]) {
        DoublePack sums[R::sums][kDoublePacks] = {};
        for (int64_t at = 0; at < count; at += kLanes) {
            const T* s[tensors];
            T* a[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) {
                s[i] = state[i] + at;
                a[i] = adjoint[i] + at;
            }
            vjp_lanes<Stream>(c, s, grad + at, a, u + at, sums);
        }
        __builtin_memcpy(lanes, sums, sizeof sums);
    }

    static void vjp(const Task& task, int64_t group, int64_t begin, int64_t end, double* sums) {
        const Coefficients c = coefficients(task, 0, group);
        const int64_t count = end - begin, whole = count / kLanes * kLanes, rest = count - whole;
        const T* state[tensors];
        T* adjoint[tensors];
        for (int i = 0; i < tensors; ++i) {
            state[i] = static_cast<const T*>(task.state[i]) + begin;
            adjoint[i] = static_cast<T*>(task.adjoint[i]) + begin;
        }
        const G* grad = static_cast<const G*>(task.grads[0]) + begin;
        T* u = static_cast<T*>(task.u) + begin;
        DoublePack lanes[R::sums][kDoublePacks];
        if (reinterpret_cast<uintptr_t>(u) % kRegister == 0) {
            vjp_lanes_of_tile<true>(c, state, grad, adjoint, u, whole, lanes);
            fence();
        } else {
            vjp_lanes_of_tile<false>(c, state, grad, adjoint, u, whole, lanes);
        }
        if (rest) {
            Padded<T> last_state[tensors], last_adjoint[tensors], last_u;
            const T* s[tensors];
            T* a[tensors];
            for (int i = 0; i < tensors; ++i) {
                last_state[i] = Padded<T>(state[i] + whole, rest);
                last_adjoint[i] = Padded<T>(adjoint[i] + whole, rest);
                s[i] = last_state[i].values;
                a[i] = last_adjoint[i].values;
            }
            vjp_lanes<false>(c, s, Padded<G>(grad + whole, rest).values, a, last_u.values, lanes);
            for (int i = 0; i < tensors; ++i) last_adjoint[i].write(adjoint[i] + whole, rest);
            last_u.write(u + whole, rest);
        }
        for (int i = 0; i < R::sums; ++i) sums[i] = in_order(lanes[i]);
    }
};

template <class T, class X, class Y>
double dot_tile(const X* x, const Y* y, int64_t count) {
    using V = typename Pack<T>::type;
    DoublePack lanes[1][kDoublePacks] = {};
    const auto add = [&lanes](const X* from_x, const Y* from_y) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int j = 0; j < kPacks<T>; ++j) {
            const int at = j * Pack<T>::width;
            LaneSums<T>::make(lanes, j).add(0, load_as(from_x + at, V{}), load_as(from_y + at, V{}));
        }
    };
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t at = 0; at < whole; at += kLanes) add(x + at, y + at);
    if (whole < count) add(Padded<X>(x + whole, count - whole).values, Padded<Y>(y + whole, count - whole).values);
    return in_order(lanes[0]);
}

// --- From run-time types to compile-time ones ---------------------------------------------------------------------

template <class T>
struct Type {
    using type = T;
};

template <class F>
void with_float(DType dtype, F f) {
    switch (dtype) {
        case DType::f32:
            return f(Type<float>{});
        case DType::f64:
            return f(Type<double>{});
        case DType::bf16:
            return f(Type<bf16>{});
        case DType::f16:
            return f(Type<f16>{});
    }
}

template <class F>
void with_types(const Task& task, F f) {
    const auto with_rule = [&](auto rule) {
        const auto with_state = [&](auto state) {
            using R = typename decltype(rule)::type;
            using T = typename decltype(state)::type;
            switch (task.grad_dtype) {
                case DType::bf16:
                    return f(Over<R, T, bf16>{});
                case DType::f16:
                    return f(Over<R, T, f16>{});
                default:
                    return f(Over<R, T, T>{});
            }
        };
        if (task.dtype == DType::f64)
            with_state(Type<double>{});
        else
            with_state(Type<float>{});
    };
    switch (task.rule) {
        case RuleId::adam:
            return with_rule(Type<Adam>{});
        case RuleId::sgd_plain:
            return with_rule(Type<SgdPlain>{});
        case RuleId::sgd_momentum:
        case RuleId::sgd_nesterov:
            return with_rule(Type<SgdMomentum>{});
    }
}

void replay(const Task& task, int64_t group, int64_t begin, int64_t end) {
    with_types(task, [&](auto over) { decltype(over)::replay(task, group, begin, end); });
}

void vjp(const Task& task, int64_t group, int64_t begin, int64_t end, double* sums) {
    with_types(task, [&](auto over) { decltype(over)::vjp(task, group, begin, end, sums); });
}

template <class X, class Y>
struct Wider {
    using type = float;
};
template <class Y>
struct Wider<double, Y> {
    using type = double;
};
template <class X>
struct Wider<X, double> {
    using type = double;
};
template <>
struct Wider<double, double> {
    using type = double;
};

void dot(const Dot& task, int64_t begin, int64_t end, double* sums) {
    with_float(task.x_dtype, [&](auto x_type) {
        with_float(task.y_dtype, [&](auto y_type) {
            using X = typename decltype(x_type)::type;
            using Y = typename decltype(y_type)::type;
            using T = typename Wider<X, Y>::type;
            sums[0] =
                dot_tile<T>(static_cast<const X*>(task.x) + begin, static_cast<const Y*>(task.y) + begin, end - begin);
        });
    });
}

}  // namespace

namespace MGD_ISA {
Kernels kernels() { return {replay, vjp, dot}; }
}  // namespace MGD_ISA

}  // namespace mgd
