#include "store/marker.h"

#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

#include "store/errors.h"
#include "store/faults.h"
#include "store/files.h"

namespace mgd {
namespace {

constexpr char kFirstLine[] = "mgd-kernels state store\n";

// The id that stands at `at` in the marker's text, as far as it is one; read() compares the whole text afterwards.
StoreId id_at(const std::string& text, size_t at) {
    StoreId id{};
    for (size_t i = 0; i < id.size() && at + 2 * i + 2 <= text.size(); ++i)
        id[i] = static_cast<uint8_t>(std::strtoul(text.substr(at + 2 * i, 2).c_str(), nullptr, 16));
    return id;
}

}  // namespace

StoreId random_id() {
    StoreId id;
    if (getrandom(id.data(), id.size(), 0) != static_cast<ssize_t>(id.size()))
        files::fail("/dev/urandom", "cannot make a random number");
    return id;
}

Marker Marker::make(bool scratch) { return {scratch, random_id(), {}}; }

std::string Marker::text() const {
    return std::string(kFirstLine) + "format " + std::to_string(kFormatVersion) + "\n" +
           (scratch ? "scratch" : "persistent") + "\nid " + hex(id) + "\ncleared " + hex(cleared) + "\n";
}

std::optional<Marker> Marker::read(int directory, const std::string& path) {
    const std::string file = path + "/" + kMarker;
    Fd fd(openat(directory, kMarker, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    if (!fd && errno == ENOENT) return std::nullopt;
    if (!fd) files::fail(file, "cannot open the marker");
    struct stat status{};
    if (fstat(fd.get(), &status) != 0) files::fail(file, "cannot read the marker");
    char bytes[256];
    const ssize_t size = S_ISREG(status.st_mode) ? ::read(fd.get(), bytes, sizeof bytes) : 0;
    if (size < 0) files::fail(file, "cannot read the marker");
    const std::string found(bytes, static_cast<size_t>(size));
    for (const bool scratch : {false, true}) {
        Marker marker{scratch, {}, {}};
        const size_t digits = 2 * marker.id.size(), cleared = marker.text().size() - digits - 1;
        marker.id = id_at(found, cleared - digits - sizeof "\ncleared " + 1);
        marker.cleared = id_at(found, cleared);
        if (found == marker.text()) return marker;
    }
    throw UnknownFormat(path, "a marker " + std::string(kMarker) + " that is not that of a store of format " +
                                  std::to_string(kFormatVersion));
}

void Marker::write(int directory, const std::string& path) const {
    const std::string all = text();
    const auto check = [&](bool good) {
        if (!good) files::fail(path + "/" + kMarker, "cannot write the marker");
    };
    check(files::unlink(directory, kMarkerTemporary) == 0 || errno == ENOENT);
    const Fd fd(files::create(directory, kMarkerTemporary, O_WRONLY));
    check(static_cast<bool>(fd));
    faults::change("write", kMarkerTemporary);
    const ssize_t size = ::write(fd.get(), all.data(), all.size());
    if (size >= 0 && size < static_cast<ssize_t>(all.size())) errno = ENOSPC;
    check(size == static_cast<ssize_t>(all.size()));
    check(files::sync(fd.get(), kMarkerTemporary) == 0 && files::rename(directory, kMarkerTemporary, kMarker) == 0);
}

}  // namespace mgd
