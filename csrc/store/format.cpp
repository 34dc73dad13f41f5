#include "store/format.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "store/checksum.h"
#include "store/errors.h"
#include "store/pool.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the store writes its fields as they lie in memory");

namespace mgd {
namespace {

constexpr char kMagic[8] = {'M', 'G', 'D', 'S', 'T', 'A', 'T', 'E'};
constexpr uint32_t kChecksumXxh3 = 1;
constexpr uint32_t kSequence = 1;                   // the only flag
constexpr uint64_t kLimit = uint64_t{1} << 62;      // no length of the format reaches it, so sums of two never wrap
constexpr uint64_t kMaxHeader = uint64_t{1} << 24;  // what opening a store may read, and hold, of one file
constexpr uint32_t kMaxRank = 64;                   // torch's limit
constexpr uint32_t kBool = 10;
constexpr size_t kMaxName = 240;
constexpr char kSuffix[] = ".mgd";

// Offsets of the fixed fields.
enum Field : size_t {
    kVersion = 8,
    kFlags = 12,
    kHeaderBytes = 16,
    kPayloadBytes = 24,
    kChunkBytes = 32,
    kChunkCount = 40,
    kTensorCount = 44,
    kKeyBytes = 48,
    kChecksumKind = 52,
    kHeaderChecksum = 56,
    kId = 64,
};

template <class T>
T get(const char* data, size_t offset) {
    T value;
    std::memcpy(&value, data + offset, sizeof value);
    return value;
}

template <class T>
void set(char* data, size_t offset, T value) {
    std::memcpy(data + offset, &value, sizeof value);
}

uint64_t table_bytes(const std::vector<TensorInfo>& tensors) {
    uint64_t n = 0;
    for (const TensorInfo& t : tensors) n += 8 + 8 * t.shape.size() + 16;
    return n;
}

uint64_t header_size(uint64_t key_bytes, uint64_t tensor_table, uint64_t chunks) {
    return round_up(kFixedHeader + round_up(key_bytes, 8) + tensor_table + 8 * chunks, kPage);
}

// Bytes of a tensor, or kLimit when the shape is impossible.
uint64_t shape_bytes(const TensorInfo& t) {
    unsigned __int128 n = item_bytes(t.dtype);
    bool empty = false;
    for (int64_t d : t.shape) {
        if (d < 0) return kLimit;
        empty |= d == 0;
    }
    if (empty) return 0;
    for (int64_t d : t.shape) {
        n *= static_cast<uint64_t>(d);
        if (n >= kLimit / 2) return kLimit;
    }
    return static_cast<uint64_t>(n);
}

// By hand: std::isalnum depends on the locale.
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_plain(char c) {
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_' || c == '.';
}

std::string escaped(const std::string& key) {
    std::string name;
    for (const char c : key) {
        if (is_plain(c)) {
            name += c;
        } else {
            char code[4];
            std::snprintf(code, sizeof code, "%%%02X", static_cast<unsigned char>(c));
            name += code;
        }
    }
    return name;
}

// Well-formed: no overlong spelling, no surrogate, nothing past U+10FFFF.
bool is_utf8(const std::string& text) {
    for (size_t i = 0; i < text.size();) {
        const auto byte = [&](size_t at) { return at < text.size() ? static_cast<uint8_t>(text[at]) : uint8_t{0}; };
        const uint8_t lead = byte(i);
        const size_t more = lead < 0x80 ? 0 : lead < 0xC2 ? 4 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : lead < 0xF5 ? 3 : 4;
        if (more == 4) return false;
        for (size_t j = 1; j <= more; ++j)
            if ((byte(i + j) & 0xC0) != 0x80) return false;
        const uint8_t next = byte(i + 1);
        if ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) ||
            (lead == 0xF4 && next > 0x8F))
            return false;
        i += 1 + more;
    }
    return true;
}

// Reads the variable part of a header with bounds checks.
class Cursor {
  public:
    Cursor(const char* data, size_t at, size_t end) : data_(data), at_(at), end_(end) {}
    bool has(uint64_t bytes) const { return bytes <= end_ - at_; }
    template <class T>
    T take() {
        const T value = get<T>(data_, at_);
        at_ += sizeof(T);
        return value;
    }
    std::string text(size_t bytes) {
        std::string value(data_ + at_, bytes);
        at_ += bytes;
        return value;
    }
    bool only_zeros(size_t bytes) {
        const char* from = data_ + at_;
        at_ += bytes;
        return std::all_of(from, from + bytes, [](char c) { return c == 0; });
    }
    size_t rest() const { return end_ - at_; }

  private:
    const char* data_;
    size_t at_, end_;
};

}  // namespace

std::string hex(const StoreId& id) {
    std::string text;
    for (const uint8_t byte : id) {
        char digits[3];
        std::snprintf(digits, sizeof digits, "%02x", byte);
        text += digits;
    }
    return text;
}

size_t item_bytes(uint32_t dtype) {
    constexpr uint8_t sizes[] = {0, 2, 2, 4, 8, 8, 1, 4, 2, 1, 1};  // bf16 f16 f32 f64 i64 u8 i32 i16 i8 bool
    return dtype < sizeof sizes ? sizes[dtype] : 0;
}

Header Header::make(std::string key, bool sequence, std::vector<TensorInfo> tensors, uint64_t chunk_bytes) {
    Header h;
    h.sequence = sequence;
    uint64_t end = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        TensorInfo& t = tensors[i];
        t.bytes = shape_bytes(t);
        t.offset = round_up(end, kTensorAlignment);
        if (item_bytes(t.dtype) == 0 || t.shape.size() > kMaxRank || t.bytes >= kLimit / 2 || t.offset >= kLimit / 2)
            throw BadStoreArgument("expected a known dtype and a possible shape for tensor " + std::to_string(i));
        end = t.offset + t.bytes;
    }
    h.key = std::move(key);
    h.tensors = std::move(tensors);
    h.chunk_bytes = chunk_bytes;
    h.payload_bytes = round_up(end, kPage);
    h.sums.resize((h.payload_bytes + chunk_bytes - 1) / chunk_bytes);
    h.header_bytes = header_size(h.key.size(), table_bytes(h.tensors), h.sums.size());
    if (h.header_bytes > kMaxHeader) throw BadStoreArgument("expected fewer tensors or chunks in one entry");
    return h;
}

void Header::encode(char* data) const {
    std::memset(data, 0, header_bytes);
    std::memcpy(data, kMagic, sizeof kMagic);
    set<uint32_t>(data, kVersion, kFormatVersion);
    set<uint32_t>(data, kFlags, sequence ? kSequence : 0);
    set<uint64_t>(data, kHeaderBytes, header_bytes);
    set<uint64_t>(data, kPayloadBytes, payload_bytes);
    set<uint64_t>(data, kChunkBytes, chunk_bytes);
    set<uint32_t>(data, kChunkCount, chunks());
    set<uint32_t>(data, kTensorCount, static_cast<uint32_t>(tensors.size()));
    set<uint32_t>(data, kKeyBytes, static_cast<uint32_t>(key.size()));
    set<uint32_t>(data, kChecksumKind, kChecksumXxh3);
    std::memcpy(data + kId, id.data(), id.size());
    std::memcpy(data + kFixedHeader, key.data(), key.size());
    size_t at = kFixedHeader + round_up(key.size(), 8);
    for (const TensorInfo& t : tensors) {
        set<uint32_t>(data, at, t.dtype);
        set<uint32_t>(data, at + 4, static_cast<uint32_t>(t.shape.size()));
        at += 8;
        for (int64_t d : t.shape) set<int64_t>(data, at, d), at += 8;
        set<uint64_t>(data, at, t.offset);
        set<uint64_t>(data, at + 8, t.bytes);
        at += 16;
    }
    for (uint64_t sum : sums) set<uint64_t>(data, at, sum), at += 8;
    set<uint64_t>(data, kHeaderChecksum, checksum(data, header_bytes));  // the field itself is zero until here
}

uint64_t Header::header_length(const char* data, uint64_t file_bytes, const std::string& key, const std::string& path) {
    if (std::memcmp(data, kMagic, sizeof kMagic) != 0)
        throw CorruptState(key, kWholeFile, path + ": expected the magic 'MGDSTATE' at its beginning");
    const auto version = get<uint32_t>(data, kVersion);
    if (version != kFormatVersion)
        throw UnknownFormat(path, "format version " + std::to_string(version) + "; this reader knows version " +
                                      std::to_string(kFormatVersion));
    const auto bytes = get<uint64_t>(data, kHeaderBytes);
    if (bytes < kPage || bytes % kPage != 0 || bytes > kMaxHeader || bytes > file_bytes)
        throw CorruptState(key, kWholeFile,
                           path + ": expected a header of whole pages in a file of " + std::to_string(file_bytes) +
                               " bytes; got " + std::to_string(bytes) + " bytes");
    return bytes;
}

Header Header::decode(char* data, size_t bytes, uint64_t file_bytes, const std::string& key, const std::string& path) {
    const auto corrupt = [&](const std::string& text) { return CorruptState(key, kWholeFile, path + ": " + text); };
    const auto unknown = [&](const std::string& text) { return UnknownFormat(path, text); };

    Header h;
    h.header_bytes = header_length(data, file_bytes, key, path);
    if (bytes < h.header_bytes) throw corrupt("expected a whole header; got a file that ends inside it");
    const auto stated = get<uint64_t>(data, kHeaderChecksum);
    set<uint64_t>(data, kHeaderChecksum, 0);
    const uint64_t actual = checksum(data, h.header_bytes);
    if (stated != actual) {
        char text[96];
        std::snprintf(text, sizeof text, "expected header checksum %016" PRIx64 "; got %016" PRIx64, stated, actual);
        throw corrupt(text);
    }
    // From here on the header is what its writer wrote; anything that does not fit is of another format.
    const auto flags = get<uint32_t>(data, kFlags);
    if ((flags & ~kSequence) != 0) throw unknown("flags that this reader does not know");
    h.sequence = (flags & kSequence) != 0;
    if (get<uint32_t>(data, kChecksumKind) != kChecksumXxh3) throw unknown("an unknown kind of checksum");
    std::memcpy(h.id.data(), data + kId, h.id.size());
    h.payload_bytes = get<uint64_t>(data, kPayloadBytes);
    h.chunk_bytes = get<uint64_t>(data, kChunkBytes);
    const auto chunk_count = get<uint32_t>(data, kChunkCount);
    const auto tensor_count = get<uint32_t>(data, kTensorCount);
    const auto key_bytes = get<uint32_t>(data, kKeyBytes);
    if (h.payload_bytes >= kLimit || h.payload_bytes % kPage != 0) throw unknown("a payload of impossible length");
    if (h.chunk_bytes == 0 || h.chunk_bytes >= kLimit || h.chunk_bytes % kPage != 0)
        throw unknown("chunks of impossible length");
    if (chunk_count != (h.payload_bytes + h.chunk_bytes - 1) / h.chunk_bytes)
        throw unknown("a number of chunks that does not match the payload");

    Cursor in(data, kFixedHeader, h.header_bytes);
    if (key_bytes > kMaxName || !in.has(round_up(key_bytes, 8))) throw unknown("a key that is too long");
    h.key = in.text(key_bytes);
    if (!in.only_zeros(round_up(key_bytes, 8) - key_bytes)) throw unknown("padding that is not zero");
    if (h.key != key) throw corrupt("expected this entry; got '" + escaped(h.key) + "': the file was renamed");
    if (!h.sequence && tensor_count != 1) throw unknown("a number of tensors other than 1, and no list");
    uint64_t end = 0;
    for (uint32_t i = 0; i < tensor_count; ++i) {
        TensorInfo t;
        if (!in.has(8)) throw unknown("a tensor table that is longer than the header");
        t.dtype = in.take<uint32_t>();
        const auto rank = in.take<uint32_t>();
        if (rank > kMaxRank) throw unknown("a tensor of more dimensions than " + std::to_string(kMaxRank));
        if (!in.has(8 * uint64_t{rank} + 16)) throw unknown("a tensor table that is longer than the header");
        for (uint32_t d = 0; d < rank; ++d) t.shape.push_back(in.take<int64_t>());
        t.offset = in.take<uint64_t>();
        t.bytes = in.take<uint64_t>();
        if (item_bytes(t.dtype) == 0) throw unknown("a dtype that this reader does not know");
        if (t.bytes != shape_bytes(t) || t.offset != round_up(end, kTensorAlignment) || t.offset >= kLimit)
            throw unknown("a tensor whose place does not follow from its shape");
        end = t.offset + t.bytes;
        h.tensors.push_back(std::move(t));
    }
    if (h.payload_bytes != round_up(end, kPage)) throw unknown("a payload that its tensors do not fill");
    if (!in.has(8 * uint64_t{chunk_count})) throw unknown("a checksum table that is longer than the header");
    for (uint32_t i = 0; i < chunk_count; ++i) h.sums.push_back(in.take<uint64_t>());
    if (in.rest() >= kPage || !in.only_zeros(in.rest())) throw unknown("something after the checksum table");
    if (file_bytes != h.file_bytes())
        throw corrupt("expected a file of " + std::to_string(h.file_bytes()) + " bytes; got " +
                      std::to_string(file_bytes));
    return h;
}

size_t Header::chunk_size(uint32_t i) const {
    return static_cast<size_t>(std::min(chunk_bytes, payload_bytes - i * chunk_bytes));
}

uint64_t Header::tensor_bytes() const {
    uint64_t n = 0;
    for (const TensorInfo& t : tensors) n += t.bytes;
    return n;
}

std::vector<Piece> Header::pieces(uint32_t chunk) const {
    const uint64_t from = chunk * chunk_bytes, to = from + chunk_size(chunk);
    std::vector<Piece> result;
    auto t = std::upper_bound(tensors.begin(), tensors.end(), from,
                              [](uint64_t at, const TensorInfo& x) { return at < x.offset + x.bytes; });
    for (; t != tensors.end() && t->offset < to; ++t) {
        const uint64_t begin = std::max(from, t->offset), end = std::min(to, t->offset + t->bytes);
        if (begin < end)
            result.push_back({static_cast<size_t>(t - tensors.begin()), begin - t->offset,
                              static_cast<size_t>(begin - from), static_cast<size_t>(end - begin)});
    }
    return result;
}

bool Header::possible(uint32_t chunk, const char* data) const {
    const auto has_bools = [](const TensorInfo& t) { return t.dtype == kBool; };
    if (std::none_of(tensors.begin(), tensors.end(), has_bools)) return true;
    for (const Piece& piece : pieces(chunk)) {
        const char* from = data + piece.chunk_offset;
        const auto impossible = [](char c) { return (c & ~1) != 0; };
        if (has_bools(tensors[piece.tensor]) && std::any_of(from, from + piece.bytes, impossible)) return false;
    }
    return true;
}

void Header::clear_padding(uint32_t chunk, char* data) const {
    size_t end = 0;
    for (const Piece& piece : pieces(chunk)) {
        std::memset(data + end, 0, piece.chunk_offset - end);
        end = piece.chunk_offset + piece.bytes;
    }
    std::memset(data + end, 0, chunk_size(chunk) - end);
}

bool valid_key(const std::string& key) {
    if (!is_utf8(key)) return false;
    if (key.compare(0, 5, "text-") == 0) return key.size() > 5;
    if (key.compare(0, 5, "step-") != 0) return false;
    const bool negative = key.size() > 5 && key[5] == '-';
    const size_t digits = 5 + negative;
    size_t at = digits;
    while (at < key.size() && is_digit(key[at])) ++at;
    const bool one_spelling = key[digits] != '0' || (at == digits + 1 && !negative);  // no 007, no -0
    return at > digits && one_spelling && at + 1 < key.size() && key[at] == '-';
}

std::string file_name(const std::string& key) {
    const std::string name = escaped(key);
    if (name.size() > kMaxName)
        throw BadStoreArgument("expected a key of at most " + std::to_string(kMaxName) + " bytes after escaping; got " +
                               std::to_string(name.size()));
    return name + kSuffix;
}

bool parse_file_name(const std::string& name, std::string* key) {
    const size_t suffix = sizeof kSuffix - 1;
    if (name.size() <= suffix || name.compare(name.size() - suffix, suffix, kSuffix) != 0) return false;
    key->clear();
    for (size_t i = 0; i < name.size() - suffix; ++i) {
        unsigned value = 0;
        if (name[i] != '%') {
            *key += name[i];
        } else if (i + 2 < name.size() && std::sscanf(name.c_str() + i + 1, "%2X", &value) == 1) {
            *key += static_cast<char>(value);
            i += 2;
        } else {
            return false;
        }
    }
    return valid_key(*key) && key->size() <= kMaxName && file_name(*key) == name;  // one spelling only
}

}  // namespace mgd
