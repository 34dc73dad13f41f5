// The codes of dtypes and rules, and what every rule's kernels have in common. Their only home: the CPU and the CUDA
// kernels compile this header, and Python reads the codes from the extension module.

#pragma once

namespace mgd {

enum class DType : int { f32, f64, bf16, f16 };
enum class RuleId : int { adam, sgd_plain, sgd_momentum, sgd_nesterov };

// Room for the sums over all elements from which a rule's VJP makes the cotangents of its hyperparameters.
constexpr int kMaxSums = 9;
// Which of a rule's sums a VJP computes. The first kRates of every rule are those that the cotangents of its learning
// rate and decoupled weight decay come from, which are the first columns.
enum class Wanted : int { none, rates, all };
constexpr int kRates = 2;

}  // namespace mgd
