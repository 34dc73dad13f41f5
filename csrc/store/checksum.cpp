#include "store/checksum.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// One source, compiled for several instruction sets; the loader picks one when the program starts. Needs glibc's
// loader; thread sanitizer cannot run before it.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && \
    !defined(__SANITIZE_THREAD__)
#define MGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define MGD_CLONES
#endif

namespace mgd {
namespace {

constexpr uint64_t kPrime32[3] = {0x9E3779B1u, 0x85EBCA77u, 0xC2B2AE3Du};
constexpr uint64_t kPrime64[5] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u, 0x85EBCA77C2B2AE63u,
                                  0x27D4EB2F165667C5u};
constexpr size_t kStripe = 64, kSecretBytes = 192, kStripesPerBlock = (kSecretBytes - kStripe) / 8;
constexpr size_t kBlock = kStripe * kStripesPerBlock;
constexpr size_t kLargeCopy = 1 << 20, kTile = 16 * kBlock;

constexpr unsigned char kSecret[kSecretBytes] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4,
    0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e,
    0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43,
    0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19,
    0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7,
    0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78,
    0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16,
    0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t load(const unsigned char* p) {
    uint64_t v;
    std::memcpy(&v, p, 8);
    return v;
}

inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Eight lanes; each data word also enters its neighbour, so that a zero factor hides nothing.
inline __attribute__((always_inline)) void accumulate(uint64_t* lanes, const unsigned char* stripe,
                                                      const unsigned char* secret) {
    uint64_t data[8], mixed[8];
    for (int i = 0; i < 8; ++i) data[i] = load(stripe + 8 * i);
    for (int i = 0; i < 8; ++i) mixed[i] = data[i] ^ load(secret + 8 * i);
    for (int i = 0; i < 8; ++i) lanes[i] += data[i ^ 1] + (mixed[i] & 0xFFFFFFFFu) * (mixed[i] >> 32);
}

// Copies that do not touch the cache, or do.
inline __attribute__((always_inline)) void copy(unsigned char* to, const unsigned char* from, size_t bytes,
                                                bool past_cache) {
#ifdef __SSE2__
    if (past_cache) {
        for (size_t i = 0; i < bytes; i += 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                             _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        return;
    }
#endif
    std::memcpy(to, from, bytes);
}

// Block by block: hashed, and copied while it is in the first-level cache. last: bytes that end the input, of which
// those behind the last whole block are hashed in their own way; else `bytes` is whole blocks.
MGD_CLONES
void consume(uint64_t* state, const unsigned char* p, size_t bytes, unsigned char* to, bool past_cache, bool last) {
    uint64_t lanes[8];
    std::memcpy(lanes, state, sizeof lanes);
    const size_t blocks = last ? (bytes - 1) / kBlock : bytes / kBlock;
    for (size_t b = 0; b < blocks; ++b) {
        for (size_t s = 0; s < kStripesPerBlock; ++s, p += kStripe) accumulate(lanes, p, kSecret + 8 * s);
        for (int i = 0; i < 8; ++i) {
            lanes[i] ^= lanes[i] >> 47;
            lanes[i] ^= load(kSecret + kSecretBytes - kStripe + 8 * i);
            lanes[i] *= kPrime32[0];
        }
        if (to != nullptr) copy(to, p - kBlock, kBlock, past_cache), to += kBlock;
    }
    if (last) {
        const size_t rest = bytes - blocks * kBlock;
        for (size_t s = 0; s < (rest - 1) / kStripe; ++s) accumulate(lanes, p + s * kStripe, kSecret + 8 * s);
        // The last stripe may begin before `p`.
        accumulate(lanes, p + rest - kStripe, kSecret + kSecretBytes - kStripe - 7);
        if (to != nullptr) std::memcpy(to, p, rest);
    }
    std::memcpy(state, lanes, sizeof lanes);
}

struct Lanes {
    uint64_t lanes[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                         kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
    explicit Lanes(size_t bytes) {
        if (bytes <= 240) throw std::invalid_argument("checksum: expected more than 240 bytes");
    }
};

uint64_t finish(const uint64_t* lanes, size_t bytes) {
    uint64_t hash = bytes * kPrime64[0];
    for (int i = 0; i < 4; ++i) {
        const unsigned char* secret = kSecret + 11 + 16 * i;
        hash += multiply_fold(lanes[2 * i] ^ load(secret), lanes[2 * i + 1] ^ load(secret + 8));
    }
    hash ^= hash >> 37;
    hash *= 0x165667919E3779F9u;
    return hash ^ (hash >> 32);
}

uint64_t hash_and_copy(const void* data, size_t bytes, void* to) {
    Lanes state(bytes);
    consume(state.lanes, static_cast<const unsigned char*>(data), bytes, static_cast<unsigned char*>(to),
            bytes >= kLargeCopy, true);
#ifdef __SSE2__
    if (to != nullptr) _mm_sfence();
#endif
    return finish(state.lanes, bytes);
}

}  // namespace

uint64_t checksum_in_tiles(const void* data, size_t bytes, const OnTile& before, const OnTile& after) {
    Lanes state(bytes);
    const auto* p = static_cast<const unsigned char*>(data);
    for (size_t begin = 0; begin < bytes; begin += kTile) {
        const size_t end = std::min(bytes, begin + kTile);
        if (before) before(begin, end);
        consume(state.lanes, p + begin, end - begin, nullptr, false, end == bytes);
        if (after) after(begin, end);
    }
    return finish(state.lanes, bytes);
}

uint64_t checksum(const void* data, size_t bytes) { return hash_and_copy(data, bytes, nullptr); }

uint64_t copy_with_checksum(void* to, const void* from, size_t bytes) { return hash_and_copy(from, bytes, to); }

}  // namespace mgd
