// SGD, element by element: the step, its vector-Jacobian product and its Jacobian-vector product. The rule is that of
// `torch.optim.SGD` (coupled weight decay l2, momentum, dampening, Nesterov; the first step sets the buffer to g), with
// decoupled weight decay beside it. With g = grad_scale * grad + l2 * p:
//
//     buf' = momentum buf + (1 - dampening) g, or g when k = 1    d = g + momentum buf' (Nesterov), buf', or g (plain)
//     p' = (1 - lr wd) p - lr d

#pragma once

#include "optim/element.h"

namespace mgd {

// Slots: 0 (plain) or 1 (with the momentum buffer).
template <int Slots>
struct Sgd {
    static constexpr int slots = Slots;
    static constexpr int columns = 5;  // of the hyperparameter table, in the order of the enumeration
    static constexpr int sums = 7;     // over all elements, from which the cotangents of the columns come
    static_assert(sums <= kMaxSums && kRates <= sums);
    enum Column { lr, weight_decay, l2, momentum, dampening };
    enum Sum { ap_d, ap_p, u_p, dd_buf1, dbuf1_buf, dbuf1_g, u_grad };

    template <class T>
    struct Coefficients {
        T lr, decay, l2, momentum, one_minus_dampening, grad_scale;
        bool first, nesterov;
    };

    // The derivatives of the coefficients in a direction.
    template <class T>
    struct Tangents {
        T lr, decay, l2, momentum, dampening;
        bool any;  // is not 0
    };

    template <class V>
    struct Terms {
        V g, buf1, d;
    };

    // From one row of the table and the step number k >= 1: all in double, rounded to T once.
    template <class T>
    MGD_HD Coefficients<T> prepare(const double* h, double k, double grad_scale, RuleId rule) {
        Coefficients<T> c;
        c.lr = T(h[lr]);
        c.decay = T(1 - h[lr] * h[weight_decay]);
        c.l2 = T(h[l2]);
        c.momentum = T(h[momentum]);
        c.one_minus_dampening = T(1 - h[dampening]);
        c.grad_scale = T(grad_scale);
        c.first = k == 1;
        c.nesterov = rule == RuleId::sgd_nesterov;
        return c;
    }

    // From a row of the table and its tangent `d`: all in double, rounded to T once.
    template <class T>
    MGD_HD Tangents<T> prepare_tangents(const double* h, const double* d, double) {
        Tangents<T> c;
        c.lr = T(d[lr]);
        c.decay = T(-(d[lr] * h[weight_decay] + h[lr] * d[weight_decay]));
        c.l2 = T(d[l2]);
        c.momentum = T(d[momentum]);
        c.dampening = T(d[dampening]);
        c.any = false;
        for (int i = 0; i < columns; ++i) c.any = c.any || d[i] != 0;
        return c;
    }

    template <class V, class T>
    MGD_HD Terms<V> terms(const Coefficients<T>& c, V grad, const V* state) {
        Terms<V> t;
        t.g = grad * c.grad_scale + state[0] * c.l2;
        t.buf1 = t.d = t.g;
        if constexpr (Slots > 0) {
            if (!c.first) t.buf1 = state[1] * c.momentum + t.g * c.one_minus_dampening;
            t.d = c.nesterov ? t.g + t.buf1 * c.momentum : t.buf1;
        }
        return t;
    }

    // state: p and the buffer, before and after.
    template <class V, class T>
    MGD_HD void step(const Coefficients<T>& c, V grad, V* state) {
        const Terms<V> t = terms(c, grad, state);
        state[0] = state[0] * c.decay - t.d * c.lr;
        if constexpr (Slots > 0) state[1] = t.buf1;
    }

    // state: before the step. adjoint: cotangents of (p', buf') in, of (p, buf) out; u: that of grad.
    template <class V, class T, class Sums>
    MGD_HD void vjp(const Coefficients<T>& c, V grad, const V* state, V* adjoint, V& u, Sums&& sum) {
        const V p = state[0], ap = adjoint[0];
        const Terms<V> t = terms(c, grad, state);
        const V dd = V{} - ap * c.lr;
        V dg = dd;
        if constexpr (Slots > 0) {
            const V dbuf1 = adjoint[1] + (c.nesterov ? dd * c.momentum : dd);
            dg = c.first ? dbuf1 : dbuf1 * c.one_minus_dampening;
            if (c.nesterov) {
                dg = dg + dd;
                sum.add(dd_buf1, dd, t.buf1);
            }
            if (!c.first) {
                sum.add(dbuf1_buf, dbuf1, state[1]);
                sum.add(dbuf1_g, dbuf1, t.g);
            }
            adjoint[1] = c.first ? V{} : dbuf1 * c.momentum;
        }
        sum.add(ap_d, ap, t.d);
        sum.add(ap_p, ap, p);
        sum.add(u_p, dg, p);
        sum.add(u_grad, dg, grad);
        adjoint[0] = ap * c.decay + dg * c.l2;
        u = dg * c.grad_scale;
    }

    // state: before the step. tangent: of it in, of that after the step out; dgrad: of grad_scale * grad.
    template <class V, class T>
    MGD_HD void jvp(const Coefficients<T>& c, const Tangents<T>& d, V grad, V dgrad, const V* state, V* tangent) {
        const Terms<V> t = terms(c, grad, state);
        V dg = dgrad + tangent[0] * c.l2;
        if (d.any) dg = dg + state[0] * d.l2;
        V dd = dg;
        if constexpr (Slots > 0) {
            V dbuf1 = dg;
            if (!c.first) {
                dbuf1 = tangent[1] * c.momentum + dg * c.one_minus_dampening;
                if (d.any) dbuf1 = dbuf1 + (state[1] * d.momentum - t.g * d.dampening);
            }
            dd = dbuf1;
            if (c.nesterov) {
                dd = dg + dbuf1 * c.momentum;
                if (d.any) dd = dd + t.buf1 * d.momentum;
            }
            tangent[1] = dbuf1;
        }
        tangent[0] = tangent[0] * c.decay - dd * c.lr;
        if (d.any) tangent[0] = tangent[0] + (state[0] * d.decay - t.d * d.lr);
    }

    // The cotangents of the columns and, last, of grad_scale, from the sums: `out` has columns + 1 places.
    MGD_HD void cotangents(const double* h, double, const double* s, double* out) {
        out[lr] = -(s[ap_d] + h[weight_decay] * s[ap_p]);
        out[weight_decay] = -h[lr] * s[ap_p];
        out[l2] = s[u_p];
        out[momentum] = s[dd_buf1] + s[dbuf1_buf];
        out[dampening] = -s[dbuf1_g];
        out[columns] = s[u_grad];
    }
};

using SgdPlain = Sgd<0>;
using SgdMomentum = Sgd<1>;

}  // namespace mgd
