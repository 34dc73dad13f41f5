#include "store/directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <optional>

#include "store/errors.h"
#include "store/faults.h"
#include "store/format.h"

namespace mgd {
namespace {

constexpr char kMarker[] = "MGD_STORE", kLock[] = "LOCK", kScratchPrefix[] = "mgd-scratch-", kTemporary[] = ".tmp";
constexpr char kMarkerFirstLine[] = "mgd-kernels state store\n";

class Fd {
  public:
    explicit Fd(int fd) : fd_(fd) {}
    ~Fd() {
        if (fd_ >= 0) ::close(fd_);
    }
    Fd(const Fd&) = delete;
    Fd& operator=(const Fd&) = delete;
    int get() const { return fd_; }
    int release() {
        const int fd = fd_;
        fd_ = -1;
        return fd;
    }

  private:
    int fd_;
};

[[noreturn]] void fail(const std::string& path, const std::string& what) {
    const int error = errno;
    throw StoreIOError(error, path, what);
}

std::vector<std::string> names_in(int directory) {
    std::vector<std::string> names;
    const int copy = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR* stream = copy < 0 ? nullptr : fdopendir(copy);
    if (stream == nullptr) {
        if (copy >= 0) ::close(copy);
        return names;
    }
    while (const dirent* entry = readdir(stream)) {
        const std::string name = entry->d_name;
        if (name != "." && name != "..") names.push_back(name);
    }
    closedir(stream);
    return names;
}

bool is_temporary(const std::string& name) {
    const size_t suffix = sizeof kTemporary - 1;
    if (name.size() <= suffix || name.compare(name.size() - suffix, suffix, kTemporary) != 0) return false;
    const size_t dot = name.rfind('.', name.size() - suffix - 1);  // before the sequence number
    std::string key;
    return dot != std::string::npos && parse_file_name(name.substr(0, dot), &key);
}

bool is_ours(const std::string& name) {
    std::string key;
    return name == kMarker || name == kLock || is_temporary(name) || parse_file_name(name, &key);
}

// The marker's kind, "scratch" or "persistent"; nothing where there is no marker.
// Throws UnknownFormat for a marker that this program does not know.
std::optional<std::string> read_marker(int directory, const std::string& path) {
    Fd fd(openat(directory, kMarker, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    if (fd.get() < 0 && errno == ENOENT) return std::nullopt;
    if (fd.get() < 0) fail(path + "/" + kMarker, "cannot open the marker");
    struct stat status{};
    char text[256];
    const ssize_t bytes =
        fstat(fd.get(), &status) == 0 && S_ISREG(status.st_mode) ? read(fd.get(), text, sizeof text) : -1;
    const std::string marker(text, bytes > 0 ? static_cast<size_t>(bytes) : 0);
    const std::string known = std::string(kMarkerFirstLine) + "format " + std::to_string(kFormatVersion) + "\n";
    for (const char* kind : {"scratch", "persistent"})
        if (marker == known + kind + "\n") return kind;
    throw UnknownFormat(path, "a marker " + std::string(kMarker) + " that is not that of a store of format " +
                                  std::to_string(kFormatVersion));
}

void write_marker(int directory, const std::string& path, const char* kind) {
    const std::string text =
        std::string(kMarkerFirstLine) + "format " + std::to_string(kFormatVersion) + "\n" + kind + "\n";
    const std::string temporary = std::string(kMarker) + kTemporary;
    Fd fd(openat(directory, temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666));
    if (fd.get() < 0 || write(fd.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
        fsync(fd.get()) != 0 || renameat(directory, temporary.c_str(), directory, kMarker) != 0)
        fail(path + "/" + kMarker, "cannot write the marker");
}

// Takes the lock and writes our process id into it; returns the open lock file, or -1 and the holder's id.
// An open-file-description lock: it also keeps out a second store of this process.
int take_lock(int directory, const std::string& path, int64_t* holder) {
    if (faults::hit(faults::Kind::open_read_only))
        throw StoreIOError(EROFS, path + "/" + kLock, "cannot create the lock file");
    Fd fd(openat(directory, kLock, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666));
    if (fd.get() < 0) fail(path + "/" + kLock, "cannot open or create the lock file");
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    if (fcntl(fd.get(), F_OFD_SETLK, &lock) != 0) {
        if (errno != EAGAIN && errno != EACCES) fail(path + "/" + kLock, "cannot lock");
        char text[32] = {};
        *holder = pread(fd.get(), text, sizeof text - 1, 0) > 0 ? std::atoll(text) : 0;
        return -1;
    }
    const std::string pid = std::to_string(getpid()) + "\n";
    if (ftruncate(fd.get(), 0) != 0 || pwrite(fd.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size()))
        fail(path + "/" + kLock, "cannot write the lock file");
    return fd.release();
}

int open_directory(int at, const std::string& name, int flags = 0) {
    return openat(at, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags);
}

// Makes the directory and its parents; returns its absolute path, which a later chdir does not change.
std::string make_directories(const std::string& path) {
    std::error_code error;
    std::filesystem::create_directories(path, error);
    if (error) throw StoreIOError(error.value(), path, "cannot make the directory");
    return std::filesystem::absolute(path).lexically_normal().string();
}

// Removes a directory that holds our files only; the lock is held by the caller.
bool remove_store(int parent, const std::string& name, int directory) {
    const std::vector<std::string> names = names_in(directory);
    for (const std::string& file : names)
        if (!is_ours(file) && file != std::string(kMarker) + kTemporary) return false;
    for (const std::string& file : names)
        if (file != kMarker && unlinkat(directory, file.c_str(), 0) != 0 && errno != ENOENT) return false;
    return unlinkat(directory, kMarker, 0) == 0 && unlinkat(parent, name.c_str(), AT_REMOVEDIR) == 0;
}

}  // namespace

std::string temporary_name(const std::string& name, uint64_t sequence) {
    return name + "." + std::to_string(sequence) + kTemporary;
}

int sweep_scratch(const std::string& parent) {
    Fd top(open_directory(AT_FDCWD, parent));
    if (top.get() < 0) return 0;
    int removed = 0;
    for (const std::string& name : names_in(top.get())) {
        if (name.compare(0, sizeof kScratchPrefix - 1, kScratchPrefix) != 0) continue;
        Fd directory(open_directory(top.get(), name, O_NOFOLLOW));
        struct stat status{};
        if (directory.get() < 0 || fstat(directory.get(), &status) != 0 || status.st_uid != geteuid()) continue;
        try {
            if (read_marker(directory.get(), name) != "scratch") continue;
            int64_t holder = 0;
            Fd lock(take_lock(directory.get(), name, &holder));
            if (lock.get() >= 0) removed += remove_store(top.get(), name, directory.get());
        } catch (const std::runtime_error&) {
            continue;  // another version's, or not ours to touch: left as it is
        }
    }
    return removed;
}

StoreDirectory StoreDirectory::scratch(const std::string& where) {
    const std::string parent = make_directories(where);
    sweep_scratch(parent);
    std::string path = parent + "/" + kScratchPrefix + "XXXXXX";
    if (mkdtemp(path.data()) == nullptr) fail(parent, "cannot make a scratch directory");
    Fd fd(open_directory(AT_FDCWD, path, O_NOFOLLOW));
    if (fd.get() < 0) fail(path, "cannot open the scratch directory");
    int64_t holder = 0;
    Fd lock(take_lock(fd.get(), path, &holder));  // before the marker: a sweep touches marked directories only
    if (lock.get() < 0) throw StoreBusy(path, holder);
    write_marker(fd.get(), path, "scratch");
    return StoreDirectory(path, fd.release(), lock.release(), true);
}

StoreDirectory StoreDirectory::persistent(const std::string& where) {
    const std::string path = make_directories(where);
    Fd fd(open_directory(AT_FDCWD, path));
    if (fd.get() < 0) fail(path, "cannot open the directory");
    auto kind = read_marker(fd.get(), path);
    if (kind == "scratch") throw UnknownFormat(path, "a scratch store, which only its own process may use");
    if (!kind) {
        for (const std::string& name : names_in(fd.get()))
            if (name != kLock && name != std::string(kMarker) + kTemporary)
                throw UnknownFormat(path, "a directory that is not empty and has no marker " + std::string(kMarker) +
                                              "; name a new or empty directory, or that of a store");
    }
    int64_t holder = 0;
    Fd lock(take_lock(fd.get(), path, &holder));
    if (lock.get() < 0) throw StoreBusy(path, holder);
    if (!kind) write_marker(fd.get(), path, "persistent");
    return StoreDirectory(path, fd.release(), lock.release(), false);
}

StoreDirectory::StoreDirectory(StoreDirectory&& other) noexcept
    : path_(std::move(other.path_)), fd_(other.fd_), lock_(other.lock_), scratch_(other.scratch_) {
    other.fd_ = other.lock_ = -1;
}

StoreDirectory::~StoreDirectory() { close(); }

std::vector<StoreDirectory::File> StoreDirectory::entries() const {
    std::vector<File> files;
    for (const std::string& name : names_in(fd_)) {
        File file{name, "", false};
        struct stat status{};
        if (!parse_file_name(name, &file.key)) continue;
        if (fstatat(fd_, name.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) continue;
        file.regular = S_ISREG(status.st_mode);
        files.push_back(std::move(file));
    }
    return files;
}

void StoreDirectory::remove_unfinished() const {
    for (const std::string& name : names_in(fd_))
        if (is_temporary(name)) unlinkat(fd_, name.c_str(), 0);
}

void StoreDirectory::rename(const std::string& from, const std::string& to) const {
    if (faults::hit(faults::Kind::rename_error)) throw StoreIOError(EIO, path_of(to), "cannot rename a finished file");
    if (renameat(fd_, from.c_str(), fd_, to.c_str()) != 0) fail(path_of(to), "cannot rename a finished file");
}

bool StoreDirectory::move_aside(const std::string& from, const std::string& to) const {
    if (renameat(fd_, from.c_str(), fd_, to.c_str()) == 0) return true;
    if (errno != ENOENT) fail(path_of(from), "cannot remove the file");
    return false;
}

void StoreDirectory::unlink(const std::string& name) const {
    if (unlinkat(fd_, name.c_str(), 0) != 0 && errno != ENOENT) fail(path_of(name), "cannot remove the file");
}

void StoreDirectory::sync() const {
    if (fsync(fd_) != 0) fail(path_, "fsync of the directory failed");
}

void StoreDirectory::close() {
    if (fd_ < 0) return;
    if (scratch_) {
        const size_t slash = path_.rfind('/');
        Fd parent(open_directory(AT_FDCWD, path_.substr(0, slash)));
        if (parent.get() >= 0) remove_store(parent.get(), path_.substr(slash + 1), fd_);
    }
    ::close(lock_);
    ::close(fd_);
    fd_ = lock_ = -1;
}

}  // namespace mgd
