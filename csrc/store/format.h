// The layout of one entry's file, version 2. docs/format.md is the specification; this is its only reader and writer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mgd {

constexpr uint32_t kFormatVersion = 2;
constexpr size_t kTensorAlignment = 64;
constexpr size_t kFixedHeader = 80;  // bytes before the variable part

// What binds entries to their store: random, made with the store and made anew when it is cleared.
using StoreId = std::array<uint8_t, 16>;
std::string hex(const StoreId& id);

struct TensorInfo {
    uint32_t dtype = 0;  // code of docs/format.md
    std::vector<int64_t> shape;
    uint64_t offset = 0, bytes = 0;  // within the payload; filled by Header::make
};

// Bytes of one element, 0 for an unknown code.
size_t item_bytes(uint32_t dtype);

// A stretch of one tensor inside one chunk.
struct Piece {
    size_t tensor;
    uint64_t tensor_offset;
    size_t chunk_offset, bytes;
};

struct Header {
    std::string key;
    StoreId id{};           // of the store; set by decode, and by who encodes
    bool sequence = false;  // a list of tensors was stored, not a single tensor
    std::vector<TensorInfo> tensors;
    uint64_t chunk_bytes = 0;
    std::vector<uint64_t> sums;  // one per chunk
    uint64_t payload_bytes = 0;  // a multiple of kPage
    uint64_t header_bytes = 0;   // a multiple of kPage

    // Lays the tensors out. Throws BadStoreArgument on an unknown dtype, a negative or too large shape.
    static Header make(std::string key, bool sequence, std::vector<TensorInfo> tensors, uint64_t chunk_bytes);

    // Parses and checks every field of the `bytes` first bytes of a file of `file_bytes` (at least header_length()).
    // Throws CorruptState or UnknownFormat. The memory is used for the check, too: its checksum is zero afterwards.
    static Header decode(char* data, size_t bytes, uint64_t file_bytes, const std::string& key,
                         const std::string& path);
    // The header's length, from the first kPage bytes of a file; the same errors.
    static uint64_t header_length(const char* data, uint64_t file_bytes, const std::string& key,
                                  const std::string& path);

    void encode(char* data) const;  // header_bytes bytes

    uint32_t chunks() const { return static_cast<uint32_t>(sums.size()); }
    size_t chunk_size(uint32_t i) const;
    uint64_t file_bytes() const { return header_bytes + payload_bytes; }
    uint64_t tensor_bytes() const;  // what the user stored, without padding
    std::vector<Piece> pieces(uint32_t chunk) const;
    bool possible(uint32_t chunk, const char* data) const;  // whether every bool in the chunk's bytes is 0 or 1
    void clear_padding(uint32_t chunk, char* data) const;   // zeros what is no tensor's in the chunk's bytes
};

// Keys are "text-<any text>" or "step-<integer>-<kind>", in UTF-8; a file is called <escaped key>.mgd.
bool valid_key(const std::string& key);
std::string file_name(const std::string& key);  // throws BadStoreArgument when longer than a file name may be
bool parse_file_name(const std::string& name, std::string* key);  // false for a name no key has

}  // namespace mgd
