// The store's promises, one exception each; bindings.cpp turns them into the classes of mgd_kernels/errors.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mgd {

// `chunk` of CorruptState when the header, or the file as a whole, is what is damaged.
constexpr int64_t kWholeFile = -1;

struct CorruptState : std::runtime_error {
    CorruptState(std::string key_, int64_t chunk_, const std::string& text)
        : std::runtime_error(text), key(std::move(key_)), chunk(chunk_) {}
    std::string key;
    int64_t chunk;
};

// An entry of another store, or of what this one held before it was cleared.
struct ForeignEntry : CorruptState {
    ForeignEntry(std::string key_, const std::string& text) : CorruptState(std::move(key_), kWholeFile, text) {}
};

struct StoreFull : std::runtime_error {
    StoreFull(uint64_t needs_, uint64_t has_, const std::string& text)
        : std::runtime_error(text), needs(needs_), has(has_) {}
    uint64_t needs, has;
};

struct StoreBusy : std::runtime_error {
    StoreBusy(std::string path_, int64_t pid_) : std::runtime_error(""), path(std::move(path_)), pid(pid_) {}
    std::string path;
    int64_t pid;
};

struct UnknownFormat : std::runtime_error {
    UnknownFormat(std::string path_, const std::string& text) : std::runtime_error(text), path(std::move(path_)) {}
    std::string path;
};

struct StoreIOError : std::runtime_error {
    StoreIOError(int error_, std::string path_, const std::string& what)
        : std::runtime_error(what), error(error_), path(std::move(path_)) {}
    int error;
    std::string path;
};

struct StoreClosed : std::logic_error {
    using std::logic_error::logic_error;
};

struct MissingKey : std::runtime_error {
    using std::runtime_error::runtime_error;  // what() is the key
};

struct BadStoreArgument : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

}  // namespace mgd
