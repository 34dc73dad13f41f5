#include "store/directory.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "store/errors.h"
#include "store/faults.h"
#include "store/format.h"

namespace mgd {
namespace {

constexpr char kScratchPrefix[] = "mgd-scratch-", kTemporary[] = ".tmp";
constexpr size_t kScratchRandom = 6;  // characters of mkdtemp
constexpr int kAttempts = 100;

bool begins(const std::string& text, const char* with) { return text.compare(0, std::strlen(with), with) == 0; }

bool is_temporary(const std::string& name) {
    const size_t suffix = sizeof kTemporary - 1;
    if (name.size() <= suffix || name.compare(name.size() - suffix, suffix, kTemporary) != 0) return false;
    const size_t dot = name.rfind('.', name.size() - suffix - 1);  // before the sequence number
    std::string key;
    return dot != std::string::npos && parse_file_name(name.substr(0, dot), &key);
}

// A file that is removed and still open somewhere: NFS keeps it under this name.
bool is_nfs_remainder(const std::string& name) {
    return begins(name, ".nfs") && name.size() > 4 &&
           name.find_first_not_of("0123456789abcdef", 4) == std::string::npos;
}

// What a directory may hold whose marker is not written yet, or is removed already.
bool is_before_marker(const std::string& name) {
    return name == kLock || name == kMarkerTemporary || is_nfs_remainder(name);
}

bool is_ours(const std::string& name) {
    std::string key;
    return is_before_marker(name) || name == kMarker || is_temporary(name) || parse_file_name(name, &key);
}

// Removes a directory that holds our files only.
bool remove_store(int parent, const std::string& name, const std::string& path, int directory, DirectoryLock& lock) {
    const std::vector<std::string> names = files::names(directory, path);
    if (!std::all_of(names.begin(), names.end(), is_ours)) return false;
    const auto gone = [directory](const std::string& file) {
        return files::unlink(directory, file) == 0 || errno == ENOENT;
    };
    for (const std::string& file : names)
        if (file != kMarker && !gone(file)) return false;
    if (!gone(kMarker)) return false;
    lock.release();  // an open file may keep its directory from being removed
    return files::unlink(parent, name, AT_REMOVEDIR) == 0;
}

// A directory may lack its marker only if a process ended between making the one and the other.
bool is_left_over_scratch(int directory, const std::string& name, const std::string& path) {
    struct stat status{};
    if (fstat(directory, &status) != 0 || status.st_uid != geteuid()) return false;
    if (const auto marker = Marker::read(directory, path)) return marker->scratch;
    const std::vector<std::string> names = files::names(directory, path);
    return name.size() == std::strlen(kScratchPrefix) + kScratchRandom &&
           std::all_of(names.begin(), names.end(), is_before_marker);
}

bool sweep_one(int parent, const std::string& name, const std::string& path) {
    try {
        const Fd directory = files::open_directory(parent, name, O_NOFOLLOW);
        if (!directory || !is_left_over_scratch(directory.get(), name, path)) return false;
        int64_t holder = 0;
        auto lock = DirectoryLock::take(directory.get(), path, &holder);
        return lock && remove_store(parent, name, path, directory.get(), *lock);
    } catch (const std::runtime_error&) {
        return false;  // another version's, or not ours to touch: left as it is
    }
}

// Throws UnknownFormat unless nothing in the directory is somebody else's.
void refuse_strangers(int directory, const std::string& path) {
    for (const std::string& name : files::names(directory, path))
        if (!is_before_marker(name) || (name == kLock && !is_lock_file(directory, path)))
            throw UnknownFormat(path, "a directory that is not empty and has no marker " + std::string(kMarker) +
                                          "; name a new or empty directory, or that of a store");
}

}  // namespace

std::string temporary_name(const std::string& name, uint64_t sequence) {
    return name + "." + std::to_string(sequence) + kTemporary;
}

int sweep_scratch(const std::string& parent) {
    const Fd top = files::open_directory(AT_FDCWD, parent);
    if (!top && errno == ENOENT) return 0;
    if (!top) files::fail(parent, "cannot open the directory");
    int removed = 0;
    for (const std::string& name : files::names(top.get(), parent))
        if (begins(name, kScratchPrefix)) removed += sweep_one(top.get(), name, parent + "/" + name);
    return removed;
}

// Nothing when a sweep, which takes a directory without a marker for a left-over, removed the new one.
std::optional<StoreDirectory> StoreDirectory::try_scratch(const std::string& parent) {
    std::string path = parent + "/" + kScratchPrefix + std::string(kScratchRandom, 'X');
    faults::change("mkdir", path);
    if (mkdtemp(path.data()) == nullptr) files::fail(parent, "cannot make a scratch directory");
    try {
        Fd fd = files::open_directory(AT_FDCWD, path, O_NOFOLLOW);
        if (!fd) files::fail(path, "cannot open the scratch directory");
        int64_t holder = 0;
        auto lock = DirectoryLock::take(fd.get(), path, &holder);
        if (!lock) return std::nullopt;
        const Marker marker = Marker::make(true);
        marker.write(fd.get(), path);
        StoreDirectory made(path, std::move(fd), std::move(*lock), marker);
        made.sync();  // or a power failure may leave entries without a marker
        return made;
    } catch (const StoreIOError& error) {
        if (error.error == ENOENT) return std::nullopt;
        throw;
    }
}

StoreDirectory StoreDirectory::scratch(const std::string& where) {
    const std::string parent = files::make_directories(where);
    sweep_scratch(parent);
    for (int attempt = 0; attempt < kAttempts; ++attempt)
        if (auto directory = try_scratch(parent)) return std::move(*directory);
    throw StoreIOError(ENOENT, parent, "scratch directories are removed as soon as they are made");
}

StoreDirectory StoreDirectory::persistent(const std::string& where) {
    const std::string path = files::make_directories(where);
    Fd fd = files::open_directory(AT_FDCWD, path);
    if (!fd) files::fail(path, "cannot open the directory");
    auto marker = Marker::read(fd.get(), path);
    if (marker && marker->scratch) throw UnknownFormat(path, "a scratch store, which only its own process may use");
    if (!marker) refuse_strangers(fd.get(), path);
    int64_t holder = 0;
    auto lock = DirectoryLock::take(fd.get(), path, &holder);
    if (!lock) throw StoreBusy(path, holder);
    marker = Marker::read(fd.get(), path);  // again: whoever had the lock before us may have written it
    if (!marker) {
        marker = Marker::make(false);
        marker->write(fd.get(), path);
    }
    StoreDirectory opened(path, std::move(fd), std::move(*lock), *marker);
    opened.sync();  // whoever wrote the marker may not have come to it
    return opened;
}

StoreDirectory::~StoreDirectory() { close(); }

void StoreDirectory::clear() {
    const Marker after{marker_.scratch, random_id(), marker_.id};
    after.write(fd(), path_);
    marker_ = after;
    sync();  // before any file is removed
}

std::vector<StoreDirectory::File> StoreDirectory::entries() const {
    std::vector<File> files;
    for (const std::string& name : files::names(fd(), path_)) {
        File file{name, "", false};
        struct stat status{};
        if (!parse_file_name(name, &file.key)) continue;
        if (fstatat(fd(), name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0)
            files::fail(path_of(name), "cannot look at the file");
        file.regular = S_ISREG(status.st_mode);
        files.push_back(std::move(file));
    }
    return files;
}

void StoreDirectory::remove_unfinished() const {
    for (const std::string& name : files::names(fd(), path_))
        if (is_temporary(name)) unlink(name);
}

void StoreDirectory::rename(const std::string& from, const std::string& to) const {
    if (files::rename(fd(), from, to) != 0) files::fail(path_of(to), "cannot rename a finished file");
}

bool StoreDirectory::move_aside(const std::string& from, const std::string& to) const {
    if (files::rename(fd(), from, to) == 0) return true;
    if (errno != ENOENT) files::fail(path_of(from), "cannot remove the file");
    return false;
}

void StoreDirectory::unlink(const std::string& name) const {
    if (files::unlink(fd(), name) != 0 && errno != ENOENT) files::fail(path_of(name), "cannot remove the file");
}

void StoreDirectory::sync() const {
    if (files::sync_directory(fd(), path_) != 0) files::fail(path_, "fsync of the directory failed");
}

void StoreDirectory::close() {
    if (!fd_) return;
    if (marker_.scratch) {
        const size_t slash = path_.rfind('/');
        try {
            const Fd parent = files::open_directory(AT_FDCWD, path_.substr(0, slash));
            if (parent) remove_store(parent.get(), path_.substr(slash + 1), path_, fd(), lock_);
        } catch (const StoreIOError&) {
            // the next start sweeps again
        }
    }
    lock_.release();
    fd_.reset();
}

}  // namespace mgd
