// The operators with fused second derivatives, over whole tensors. Results are the same bits for any number of threads.

#pragma once

#include "nn/kernels.h"

namespace mgd {

void run_activation(Pass, const Activation&, int threads);
void run_layer_norm(Pass, LayerNorm, int threads);
void run_channel_norm(Pass, ChannelNorm, int threads);
void run_softmax(Pass, const Softmax&, int threads);
// Throws std::out_of_range where a target is neither a column nor `ignored`.
void run_cross_entropy(Pass, const CrossEntropy&, int threads);
void run_rotary(const Rotary&, int threads);
void run_rotary_sums(const RotarySums&, int threads);
void run_max_pool(Pass, const MaxPool<float>&, int threads);
void run_max_pool(Pass, const MaxPool<double>&, int threads);

}  // namespace mgd
