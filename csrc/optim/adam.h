// Adam and AdamW, element by element: the step, its vector-Jacobian product and its Jacobian-vector product.
//
// Kingma & Ba 2015 (arXiv 1412.6980); decoupled weight decay after Loshchilov & Hutter 2019 (arXiv 1711.05101);
// eps_root inside the square root as in optax. With g = grad_scale * grad + l2 * p:
//
//     m' = b1 m + (1 - b1) g    v' = b2 v + (1 - b2) g^2    S = sqrt(v' / c2 + eps_root)    D = S + eps
//     n = (m' / c1) / D         p' = (1 - lr wd) p - lr n   c1 = 1 - b1^k    c2 = 1 - b2^k
//
// 0/0 is 0 (an element that never saw a gradient does not move), and where S = 0 the derivative through v is 0.

#pragma once

#include "optim/element.h"

namespace mgd {

struct Adam {
    static constexpr int slots = 2;    // exp_avg, exp_avg_sq
    static constexpr int columns = 7;  // of the hyperparameter table, in the order of the enumeration
    static constexpr int sums = 9;     // over all elements, from which the cotangents of the columns come
    static_assert(sums <= kMaxSums && kRates <= sums);
    enum Column { lr, weight_decay, l2, beta1, beta2, eps, eps_root };
    enum Sum { ap_n, ap_p, u_p, dm_m, dv_v, dvhat_v, dD, dvhat, u_grad };

    template <class T>
    struct Coefficients {
        T lr, decay, l2, beta1, beta2, one_minus_beta1, one_minus_beta2, two_one_minus_beta2;
        T inverse_c1, inverse_c2, eps, eps_root, grad_scale;
        bool scaled, coupled;  // grad_scale is not 1, l2 is not 0
        bool may_vanish;       // D = 0 is possible
    };

    // The derivatives of the coefficients in a direction.
    template <class T>
    struct Tangents {
        T lr, decay, l2, beta1, beta2, inverse_c1, inverse_c2, eps, eps_root;
        bool any;  // is not 0
    };

    template <class V>
    struct Terms {
        V g, m1, v1, S, safe_D, n;
        V ap;  // the given cotangent of p', 0 where D = 0 stops the element
    };

    // From one row of the table and the step number k >= 1: all in double, rounded to T once.
    template <class T>
    MGD_HD Coefficients<T> prepare(const double* h, double k, double grad_scale, RuleId) {
        Coefficients<T> c;
        c.lr = T(h[lr]);
        c.decay = T(1 - h[lr] * h[weight_decay]);
        c.l2 = T(h[l2]);
        c.beta1 = T(h[beta1]);
        c.beta2 = T(h[beta2]);
        c.one_minus_beta1 = T(1 - h[beta1]);
        c.one_minus_beta2 = T(1 - h[beta2]);
        c.two_one_minus_beta2 = T(2 * (1 - h[beta2]));
        c.inverse_c1 = T(1 / (1 - pow(h[beta1], k)));
        c.inverse_c2 = T(1 / (1 - pow(h[beta2], k)));
        c.eps = T(h[eps]);
        c.eps_root = T(h[eps_root]);
        c.grad_scale = T(grad_scale);
        c.scaled = c.grad_scale != 1;
        c.coupled = c.l2 != 0;
        c.may_vanish = !(c.eps > 0);
        return c;
    }

    // From a row of the table, its tangent `d` and k: all in double, rounded to T once.
    template <class T>
    MGD_HD Tangents<T> prepare_tangents(const double* h, const double* d, double k) {
        const double c1 = 1 - pow(h[beta1], k), c2 = 1 - pow(h[beta2], k);
        Tangents<T> c;
        c.lr = T(d[lr]);
        c.decay = T(-(d[lr] * h[weight_decay] + h[lr] * d[weight_decay]));
        c.l2 = T(d[l2]);
        c.beta1 = T(d[beta1]);
        c.beta2 = T(d[beta2]);
        c.inverse_c1 = T(k * pow(h[beta1], k - 1) * d[beta1] / (c1 * c1));
        c.inverse_c2 = T(k * pow(h[beta2], k - 1) * d[beta2] / (c2 * c2));
        c.eps = T(d[eps]);
        c.eps_root = T(d[eps_root]);
        c.any = false;
        for (int i = 0; i < columns; ++i) c.any = c.any || d[i] != 0;
        return c;
    }

    template <class V, class T>
    MGD_HD Terms<V> terms(const Coefficients<T>& c, V grad, V p, V m, V v, V ap) {
        const V zero = V{}, one = V{} + T(1);
        Terms<V> t;
        t.g = grad;
        if (c.scaled) t.g = t.g * c.grad_scale;
        if (c.coupled) t.g = t.g + p * c.l2;
        t.m1 = m * c.beta1 + t.g * c.one_minus_beta1;
        t.v1 = v * c.beta2 + t.g * c.one_minus_beta2 * t.g;
        const V vhat = t.v1 * c.inverse_c2 + c.eps_root;
        t.S = root(maximum(vhat, zero));
        t.ap = ap;
        const V D = t.safe_D = t.S + c.eps;
        if (c.may_vanish) t.safe_D = D > zero ? D : one;
        t.n = t.m1 * c.inverse_c1 / t.safe_D;
        if (c.may_vanish) {
            t.n = D > zero ? t.n : zero;
            t.ap = D > zero ? ap : zero;
        }
        return t;
    }

    // state: p, m, v, before and after.
    template <class V, class T>
    MGD_HD void step(const Coefficients<T>& c, V grad, V* state) {
        const Terms<V> t = terms(c, grad, state[0], state[1], state[2], V{});
        state[0] = state[0] * c.decay - t.n * c.lr;
        state[1] = t.m1;
        state[2] = t.v1;
    }

    // state: p, m, v before the step. adjoint: cotangents of (p', m', v') in, of (p, m, v) out; u: that of grad.
    template <class V, class T, class Sums>
    MGD_HD void vjp(const Coefficients<T>& c, V grad, const V* state, V* adjoint, V& u, Sums&& sum) {
        const V zero = V{};
        const V p = state[0], m = state[1], v = state[2], ap = adjoint[0];
        const Terms<V> t = terms(c, grad, p, m, v, ap);
        const V through_n = t.ap * c.lr / t.safe_D;  // = -dn / D
        const V through_D = through_n * t.n;
        const V through_vhat = t.S > zero ? through_D / (t.S + t.S) : zero;
        const V dm1 = adjoint[1] - through_n * c.inverse_c1;
        const V dv1 = adjoint[2] + through_vhat * c.inverse_c2;
        const V dg = dm1 * c.one_minus_beta1 + t.g * c.two_one_minus_beta2 * dv1;

        sum.add(ap_n, ap, t.n);
        sum.add(ap_p, ap, p);
        sum.add(u_p, dg, p);
        sum.add(dm_m, dm1, m - t.g);
        sum.add(dv_v, dv1, v - t.g * t.g);
        sum.add(dvhat_v, through_vhat, t.v1);
        sum.add(dD, through_D);
        sum.add(dvhat, through_vhat);
        sum.add(u_grad, dg, grad);

        adjoint[0] = ap * c.decay;
        if (c.coupled) adjoint[0] = adjoint[0] + dg * c.l2;
        adjoint[1] = dm1 * c.beta1;
        adjoint[2] = dv1 * c.beta2;
        u = dg * c.grad_scale;
    }

    // state: p, m, v before the step. tangent: of these in, of those after the step out; dgrad: of grad_scale * grad.
    template <class V, class T>
    MGD_HD void jvp(const Coefficients<T>& c, const Tangents<T>& d, V grad, V dgrad, const V* state, V* tangent) {
        const V zero = V{};
        const V p = state[0], m = state[1], v = state[2];
        const Terms<V> t = terms(c, grad, p, m, v, zero);
        V dg = dgrad;
        if (c.coupled) dg = dg + tangent[0] * c.l2;
        if (d.any) dg = dg + p * d.l2;
        V dm1 = tangent[1] * c.beta1 + dg * c.one_minus_beta1;
        V dv1 = tangent[2] * c.beta2 + t.g * c.two_one_minus_beta2 * dg;
        if (d.any) {
            dm1 = dm1 + (m - t.g) * d.beta1;
            dv1 = dv1 + (v - t.g * t.g) * d.beta2;
        }
        V dvhat = dv1 * c.inverse_c2, dmhat = dm1 * c.inverse_c1;
        if (d.any) {
            dvhat = dvhat + t.v1 * d.inverse_c2 + d.eps_root;
            dmhat = dmhat + t.m1 * d.inverse_c1;
        }
        V dD = t.S > zero ? dvhat / (t.S + t.S) : zero;
        if (d.any) dD = dD + d.eps;
        V dn = (dmhat - t.n * dD) / t.safe_D;
        if (c.may_vanish) dn = t.S + c.eps > zero ? dn : zero;
        tangent[0] = tangent[0] * c.decay - dn * c.lr;
        if (d.any) tangent[0] = tangent[0] + (p * d.decay - t.n * d.lr);
        tangent[1] = dm1;
        tangent[2] = dv1;
    }

    // The cotangents of the columns and, last, of grad_scale, from the sums: `out` has columns + 1 places.
    MGD_HD void cotangents(const double* h, double k, const double* s, double* out) {
        const double c1 = 1 - pow(h[beta1], k), c2 = 1 - pow(h[beta2], k);
        out[lr] = -(s[ap_n] + h[weight_decay] * s[ap_p]);
        out[weight_decay] = -h[lr] * s[ap_p];
        out[l2] = s[u_p];
        out[beta1] = s[dm_m] - k * pow(h[beta1], k - 1) / c1 * h[lr] * s[ap_n];
        out[beta2] = s[dv_v] + k * pow(h[beta2], k - 1) / (c2 * c2) * s[dvhat_v];
        out[eps] = s[dD];
        out[eps_root] = s[dvhat];
        out[columns] = s[u_grad];
    }
};

}  // namespace mgd
