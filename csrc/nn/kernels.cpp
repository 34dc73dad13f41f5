// This unit is compiled once for each instruction set, with MGD_ISA naming the namespace of its one exported function;
// everything else has internal linkage.

#include "nn/kernels.h"

#include "nn/activation.h"
#include "nn/channel_norm.h"
#include "nn/layer_norm.h"
#include "nn/pooling.h"
#include "nn/rotary.h"
#include "nn/softmax.h"

namespace mgd {
namespace MGD_ISA {
NnKernels nn_kernels() {
    return {activation, layer_norm,  channel_norm,    softmax,         cross_entropy,
            rotary,     rotary_sums, max_pool<float>, max_pool<double>};
}
}  // namespace MGD_ISA
}  // namespace mgd
