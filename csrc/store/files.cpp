#include "store/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <memory>

#include "store/errors.h"
#include "store/faults.h"

namespace mgd {

void Fd::reset(int fd) {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
}

namespace files {

void fail(const std::string& path, const std::string& what) {
    const int error = errno;
    throw StoreIOError(error, path, what);
}

int create(int directory, const std::string& name, int flags) {
    if (faults::hit(faults::Kind::open_read_only)) {
        errno = EROFS;
        return -1;
    }
    faults::change("create", name);
    return openat(directory, name.c_str(), flags | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
}

int rename(int directory, const std::string& from, const std::string& to) {
    if (faults::hit(faults::Kind::rename_error)) {
        errno = EIO;
        return -1;
    }
    faults::change("rename", from + " " + to);
    return renameat(directory, from.c_str(), directory, to.c_str());
}

int unlink(int directory, const std::string& name, int flags) {
    faults::change("unlink", name);
    return unlinkat(directory, name.c_str(), flags);
}

int sync(int fd, const std::string& path) {
    if (faults::hit(faults::Kind::sync_error)) {
        errno = EIO;
        return -1;
    }
    faults::change("sync", path);
    return fsync(fd);
}

int sync_directory(int fd, const std::string& path) {
    return sync(fd, path) == 0 || errno == EINVAL || errno == EOPNOTSUPP ? 0 : -1;
}

Fd open_directory(int at, const std::string& name, int flags) {
    return Fd(openat(at, name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags));
}

namespace {

void make_directory(const std::filesystem::path& path) {
    struct stat status{};
    if (stat(path.c_str(), &status) == 0) {
        if (S_ISDIR(status.st_mode)) return;
        errno = ENOTDIR;
        fail(path, "cannot make the directory");
    }
    if (errno != ENOENT) fail(path, "cannot make the directory");
    if (path.has_parent_path() && path.parent_path() != path) make_directory(path.parent_path());
    faults::change("mkdir", path);
    if (mkdir(path.c_str(), 0700) != 0) {
        if (errno == EEXIST) return;  // made by another process meanwhile
        fail(path, "cannot make the directory");
    }
    const Fd parent = open_directory(AT_FDCWD, path.parent_path());
    if (!parent || sync_directory(parent.get(), path.parent_path()) != 0)
        fail(path.parent_path(), "fsync of the directory failed");
}

}  // namespace

std::string make_directories(const std::string& path) {
    std::error_code error;
    std::filesystem::path absolute = std::filesystem::absolute(path, error).lexically_normal();
    if (error) throw StoreIOError(error.value(), path, "cannot tell the working directory");
    if (!absolute.has_filename()) absolute = absolute.parent_path();  // a path that ends with a slash
    make_directory(absolute);
    return absolute;
}

std::vector<std::string> names(int directory, const std::string& path) {
    std::vector<std::string> found;
    if (faults::hit(faults::Kind::list_error)) {
        errno = EIO;
        fail(path, "cannot list the directory");
    }
    Fd again = open_directory(directory, ".");
    const auto close = [](DIR* stream) { closedir(stream); };
    const std::unique_ptr<DIR, decltype(close)> stream(again ? fdopendir(again.get()) : nullptr, close);
    if (!stream) fail(path, "cannot list the directory");
    again.release();
    for (;;) {
        errno = 0;
        const dirent* entry = readdir(stream.get());
        if (entry == nullptr) break;
        const std::string name = entry->d_name;
        if (name != "." && name != "..") found.push_back(name);
    }
    if (errno != 0) fail(path, "cannot list the directory");
    return found;
}

}  // namespace files
}  // namespace mgd
