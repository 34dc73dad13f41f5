// The two conversions that csrc/optim/cuda.cu uses, with the compiler's own half type.

#pragma once

#include <cstdint>
#include <cstring>

using __half = _Float16;

inline __half __ushort_as_half(uint16_t bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __half2float(__half value) { return static_cast<float>(value); }
