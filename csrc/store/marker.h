// The marker of a directory: what kind of store it is, and which entries are its own.
#pragma once

#include <optional>
#include <string>

#include "store/format.h"

namespace mgd {

constexpr char kMarker[] = "MGD_STORE", kMarkerTemporary[] = "MGD_STORE.tmp";

struct Marker {
    bool scratch = false;
    StoreId id{};       // entries of another id are foreign
    StoreId cleared{};  // entries of this id were cleared and are to be removed; zero: none

    static Marker make(bool scratch);
    // Nothing where there is no marker. Throws UnknownFormat for one that this program does not know.
    static std::optional<Marker> read(int directory, const std::string& path);
    // Replaces the marker in one step, which is durable once the directory is.
    void write(int directory, const std::string& path) const;

  private:
    std::string text() const;
};

StoreId random_id();

}  // namespace mgd
