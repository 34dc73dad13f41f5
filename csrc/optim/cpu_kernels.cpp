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

// Where the sums are not wanted.
struct NoSums {
    template <class... V>
    inline __attribute__((always_inline)) void add(int, V...) const {}
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

// What is read in the place of a tensor that is not there.
template <class T>
alignas(64) const T zeros_of[kTile] = {};

template <class R, class T, class G>
struct Over {
    static constexpr int tensors = R::slots + 1;
    using V = typename Pack<T>::type;
    using Coefficients = typename R::template Coefficients<T>;

    static Coefficients coefficients(const Task& task, int64_t step, int64_t group) {
        return static_cast<const Coefficients*>(task.coefficients)[step * task.groups + group];
    }

    template <bool Stream>
    MGD_HD void put(T* to, V x) {
        if (Stream)
            stream(to, x);
        else
            store(to, x);
    }

    static bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kRegister == 0; }

    template <class X>
    static const X* read_from(const void* tensor, int64_t at) {
        return tensor ? static_cast<const X*>(tensor) + at : zeros_of<X>;
    }

    template <bool Stream>
    MGD_HD void step_lanes(const Coefficients& c, const T* const* state, const G* grad, T* const* out) {
#pragma GCC unroll 8
        for (int j = 0; j < kPacks<T>; ++j) {
            const int at = j * Pack<T>::width;
            V s[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) s[i] = load<V>(state[i] + at);
            R::step(c, load_as(grad + at, V{}), s);
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) put<Stream>(out[i] + at, s[i]);
        }
    }

    template <bool Stream>
    static void step(const Coefficients& c, const T* const* state, const G* grad, T* const* out, int64_t count) {
        int64_t at = 0;
        for (; at + kLanes <= count; at += kLanes) {
            const T* here[tensors];
            T* there[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) {
                here[i] = state[i] + at;
                there[i] = out[i] + at;
            }
            step_lanes<Stream>(c, here, grad + at, there);
        }
        if (at == count) return;
        Padded<T> last[tensors];
        const T* here[tensors];
        T* there[tensors];
        for (int i = 0; i < tensors; ++i) {
            last[i] = Padded<T>(state[i] + at, count - at);
            here[i] = there[i] = last[i].values;
        }
        step_lanes<false>(c, here, Padded<G>(grad + at, count - at).values, there);
        for (int i = 0; i < tensors; ++i) last[i].write(out[i] + at, count - at);
    }

    static void replay(const Task& task, const Tensors& all, int64_t group, int64_t begin, int64_t end) {
        // Memory that is not read again soon is written past the caches: no line of it is fetched first.
        bool streams = task.steps == 1;
        for (int i = 0; i < tensors; ++i)
            streams = streams && all.new_state[i] != all.state[i] && aligned(static_cast<T*>(all.new_state[i]) + begin);
        for (int64_t at = begin; at < end; at += kReplayTile) {
            const int64_t count = end - at < kReplayTile ? end - at : kReplayTile;
            const T* state[tensors];
            T* out[tensors];
            for (int i = 0; i < tensors; ++i) {
                state[i] = read_from<T>(all.state[i], at);
                out[i] = static_cast<T*>(all.new_state[i]) + at;
            }
            for (int64_t k = 0; k < task.steps; ++k) {
                const Coefficients c = coefficients(task, k, group);
                const G* grad = read_from<G>(all.grads[k], at);
                if (streams)
                    step<true>(c, state, grad, out, count);
                else
                    step<false>(c, state, grad, out, count);
                for (int i = 0; i < tensors; ++i) state[i] = out[i];
            }
        }
        if (streams) fence();
    }

    // Stream: which of the outputs are written past the caches.
    enum { kNothing, kCotangent, kEverything };

    template <int Stream, bool Sum>
    MGD_HD void vjp_lanes(const Coefficients& c, const T* const* state, const G* grad, const T* const* adjoint,
                          T* const* out, T* u, DoublePack (*lanes)[kDoublePacks]) {
#pragma GCC unroll 8
        for (int j = 0; j < kPacks<T>; ++j) {
            const int at = j * Pack<T>::width;
            V s[tensors], a[tensors], cotangent;
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) {
                s[i] = load<V>(state[i] + at);
                a[i] = load<V>(adjoint[i] + at);
            }
            const V g = load_as(grad + at, V{});
            if constexpr (Sum)
                R::vjp(c, g, s, a, cotangent, LaneSums<T>::make(lanes, j));
            else
                R::vjp(c, g, s, a, cotangent, NoSums{});
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) put<Stream == kEverything>(out[i] + at, a[i]);
            put<Stream != kNothing>(u + at, cotangent);
        }
    }

    template <int Stream, bool Sum>
    static void vjp_lanes_of_tile(const Coefficients& c, const T* const* state, const G* grad, const T* const* adjoint,
                                  T* const* out, T* u, int64_t count, DoublePack (*lanes)[kDoublePacks]) {
        DoublePack sums[R::sums][kDoublePacks] = {};
        for (int64_t at = 0; at < count; at += kLanes) {
            const T *s[tensors], *a[tensors];
            T* o[tensors];
#pragma GCC unroll 3
            for (int i = 0; i < tensors; ++i) {
                s[i] = state[i] + at;
                a[i] = adjoint[i] + at;
                o[i] = out[i] + at;
            }
            vjp_lanes<Stream, Sum>(c, s, grad + at, a, o, u + at, sums);
        }
        __builtin_memcpy(lanes, sums, sizeof sums);
    }

    template <bool Sum>
    static void vjp(const Task& task, const Tensors& all, int64_t group, int64_t begin, int64_t end, double* sums) {
        const Coefficients c = coefficients(task, 0, group);
        const int64_t count = end - begin, whole = count / kLanes * kLanes, rest = count - whole;
        const T *state[tensors], *adjoint[tensors];
        T* out[tensors];
        const G* grad = read_from<G>(all.grads[0], begin);
        T* u = static_cast<T*>(all.u) + begin;
        // As in `replay`; u is always memory of its own.
        bool apart = true;
        for (int i = 0; i < tensors; ++i) {
            state[i] = read_from<T>(all.state[i], begin);
            adjoint[i] = read_from<T>(all.adjoint[i], begin);
            // What is not wanted goes where u overwrites it at once.
            out[i] = all.new_adjoint[i] ? static_cast<T*>(all.new_adjoint[i]) + begin : u;
            apart = apart && out[i] != adjoint[i] && aligned(out[i]);
        }
        DoublePack lanes[R::sums][kDoublePacks];
        if (!aligned(u))
            vjp_lanes_of_tile<kNothing, Sum>(c, state, grad, adjoint, out, u, whole, lanes);
        else if (apart)
            vjp_lanes_of_tile<kEverything, Sum>(c, state, grad, adjoint, out, u, whole, lanes);
        else
            vjp_lanes_of_tile<kCotangent, Sum>(c, state, grad, adjoint, out, u, whole, lanes);
        fence();
        if (rest) {
            Padded<T> last_state[tensors], last_adjoint[tensors], last_u;
            const T *s[tensors], *a[tensors];
            T* o[tensors];
            for (int i = 0; i < tensors; ++i) {
                last_state[i] = Padded<T>(state[i] + whole, rest);
                last_adjoint[i] = Padded<T>(adjoint[i] + whole, rest);
                s[i] = last_state[i].values;
                a[i] = o[i] = last_adjoint[i].values;
            }
            const Padded<G> last_grad(grad + whole, rest);
            vjp_lanes<kNothing, Sum>(c, s, last_grad.values, a, o, last_u.values, lanes);
            for (int i = 0; i < tensors; ++i) last_adjoint[i].write(out[i] + whole, rest);
            last_u.write(u + whole, rest);
        }
        if constexpr (Sum)
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

void replay(const Task& task, const Tensors& tensors, int64_t group, int64_t begin, int64_t end) {
    with_types(task, [&](auto over) { decltype(over)::replay(task, tensors, group, begin, end); });
}

void vjp(const Task& task, const Tensors& tensors, int64_t group, int64_t begin, int64_t end, double* sums) {
    with_types(task, [&](auto over) {
        using O = decltype(over);
        sums ? O::template vjp<true>(task, tensors, group, begin, end, sums)
             : O::template vjp<false>(task, tensors, group, begin, end, sums);
    });
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
