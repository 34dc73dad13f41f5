#include "store/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "store/errors.h"
#include "store/faults.h"
#include "store/files.h"
#include "store/pool.h"

namespace mgd {
namespace {

using faults::Kind;

ssize_t fail(int error) {
    errno = error;
    return -1;
}

// The system calls, with the faults that tests ask for.
ssize_t pread_or_fault(int fd, char* data, size_t bytes, uint64_t offset, bool direct) {
    if (faults::hit(Kind::interrupted)) return fail(EINTR);
    if (faults::hit(Kind::read_error)) return fail(EIO);
    if (direct && faults::hit(Kind::refuse_direct)) return fail(EINVAL);
    const ssize_t done = pread(fd, data, bytes, static_cast<off_t>(offset));
    if (done > 1 && faults::hit(Kind::short_read)) {
        const ssize_t kept = done / 2 + 1;  // not a multiple of a page
        std::memset(data + kept, 0xA5, static_cast<size_t>(done - kept));
        return kept;
    }
    return done;
}

ssize_t pwrite_or_fault(int fd, const std::string& path, const char* data, size_t bytes, uint64_t offset, bool direct) {
    if (faults::hit(Kind::interrupted)) return fail(EINTR);
    if (faults::hit(Kind::write_error)) return fail(EIO);
    if (faults::hit(Kind::no_space)) return fail(ENOSPC);
    if (faults::hit(Kind::zero_write)) return 0;
    if (direct && faults::hit(Kind::refuse_direct)) return fail(EINVAL);
    faults::change("write", path);
    if (faults::hit(Kind::short_write)) {
        const int flags = fcntl(fd, F_GETFL);
        fcntl(fd, F_SETFL, flags & ~O_DIRECT);
        const ssize_t done = pwrite(fd, data, bytes / 2 + 1, static_cast<off_t>(offset));
        fcntl(fd, F_SETFL, flags);
        return done;
    }
    return pwrite(fd, data, bytes, static_cast<off_t>(offset));
}

std::string error_name(int error) { return error == EINVAL ? "EINVAL" : std::strerror(error); }

}  // namespace

void IoMode::refuse(const std::string& why) {
    std::lock_guard lock(mutex_);
    if (direct_.exchange(false)) why_ = why;
}

std::string IoMode::why() const {
    std::lock_guard lock(mutex_);
    return why_;
}

DirectFile DirectFile::open_with(int directory, const std::string& name, std::string path, IoMode& mode, int flags) {
    const bool creates = (flags & O_CREAT) != 0, direct = mode.direct();
    const auto attempt = [&](int extra) {
        if (creates) return Fd(files::create(directory, name, flags | extra));
        return Fd(openat(directory, name.c_str(), flags | extra | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    };
    Fd fd = attempt(direct ? O_DIRECT : 0);
    const bool refused = !fd && direct && errno == EINVAL;
    if (refused) {
        if (creates) files::unlink(directory, name);  // it may have been made before it was refused
        fd = attempt(0);
    }
    if (!fd)
        files::fail(path, errno == ELOOP ? "is a symbolic link, which a store never follows"
                          : creates      ? "cannot create the file"
                                         : "cannot open the file");
    if (refused) mode.refuse("the file system refuses to open files with O_DIRECT (EINVAL)");
    struct stat status{};
    if (fstat(fd.get(), &status) != 0) files::fail(path, "fstat failed");
    if (!S_ISREG(status.st_mode))
        throw StoreIOError(ELOOP, path, "is not a regular file, and a store follows no links");
    return DirectFile(fd.release(), std::move(path), mode, direct && !refused);
}

DirectFile DirectFile::create(int directory, const std::string& name, std::string path, IoMode& mode) {
    return open_with(directory, name, std::move(path), mode, O_RDWR | O_CREAT);
}

DirectFile DirectFile::open(int directory, const std::string& name, std::string path, IoMode& mode) {
    return open_with(directory, name, std::move(path), mode, O_RDONLY);
}

DirectFile::DirectFile(DirectFile&& other) noexcept
    : fd_(other.fd_), path_(std::move(other.path_)), mode_(other.mode_), direct_(other.direct_.load()) {
    other.fd_ = -1;
}

DirectFile::~DirectFile() {
    if (fd_ >= 0) close(fd_);
}

void DirectFile::leave_direct() {
    const int flags = fcntl(fd_, F_GETFL);
    if (flags >= 0) fcntl(fd_, F_SETFL, flags & ~O_DIRECT);
    direct_ = false;
}

// Calls until all bytes went or the call returns 0; returns the bytes that went.
template <class Call>
size_t DirectFile::transfer(const char* what, size_t bytes, uint64_t offset, Call call) {
    size_t done = 0;
    while (done < bytes) {
        const bool direct = direct_;
        const ssize_t n = call(done, bytes - done, offset + done, direct);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && direct && (errno == EINVAL || errno == EOPNOTSUPP)) {
            mode_->refuse(std::string("the file system refuses a ") + what + " with O_DIRECT (" + error_name(errno) +
                          ")");
            leave_direct();
            continue;
        }
        if (n < 0) {
            const int error = errno;
            throw StoreIOError(error, path_,
                               std::string(what) + " of " + std::to_string(bytes) + " bytes at offset " +
                                   std::to_string(offset) + " failed");
        }
        if (n == 0) break;
        done += static_cast<size_t>(n);
        // What is left of a transfer that stopped inside a page is no longer aligned: this file goes on buffered.
        if (done < bytes && done % kPage != 0 && direct) leave_direct();
    }
    return done;
}

void DirectFile::write(const void* data, size_t bytes, uint64_t offset) {
    const auto* from = static_cast<const char*>(data);
    const size_t done = transfer("write", bytes, offset, [&](size_t at, size_t n, uint64_t where, bool direct) {
        return pwrite_or_fault(fd_, path_, from + at, n, where, direct);
    });
    if (done < bytes)
        throw StoreIOError(EIO, path_,
                           "write at offset " + std::to_string(offset) + " stopped after " + std::to_string(done) +
                               " of " + std::to_string(bytes) + " bytes");
}

size_t DirectFile::read(void* data, size_t bytes, uint64_t offset) {
    auto* to = static_cast<char*>(data);
    return transfer("read", bytes, offset, [&](size_t at, size_t n, uint64_t where, bool direct) {
        return pread_or_fault(fd_, to + at, n, where, direct);
    });
}

void DirectFile::reserve(uint64_t bytes) {
    faults::change("reserve", path_);
    if (bytes == 0 || fallocate(fd_, 0, 0, static_cast<off_t>(bytes)) == 0) return;
    if (errno != ENOSPC && errno != EDQUOT && errno != EFBIG) return;  // not offered here; writes will allocate
    const int error = errno;
    throw StoreIOError(error, path_, "cannot reserve " + std::to_string(bytes) + " bytes");
}

void DirectFile::sync() {
    if (files::sync(fd_, path_) != 0) files::fail(path_, "fsync failed");
}

uint64_t DirectFile::size() const {
    struct stat status{};
    if (fstat(fd_, &status) != 0) files::fail(path_, "fstat failed");
    return static_cast<uint64_t>(status.st_size);
}

}  // namespace mgd
