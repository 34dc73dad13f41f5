#include "store/faults.h"

#include <atomic>
#include <csignal>
#include <map>
#include <mutex>
#include <utility>

#include "store/errors.h"

namespace mgd::faults {
namespace {

std::atomic<Kind> armed{Kind::none};
std::atomic<long> first{0}, last{0}, seen{0};
std::mutex mutex;
std::vector<std::string> calls;

}  // namespace

long arm(const std::string& kind, long nth, long times) {
    static const std::map<std::string, Kind> kinds = {
        {"none", Kind::none},
        {"short_read", Kind::short_read},
        {"short_write", Kind::short_write},
        {"interrupted", Kind::interrupted},
        {"read_error", Kind::read_error},
        {"write_error", Kind::write_error},
        {"no_space", Kind::no_space},
        {"zero_write", Kind::zero_write},
        {"open_read_only", Kind::open_read_only},
        {"refuse_direct", Kind::refuse_direct},
        {"sync_error", Kind::sync_error},
        {"rename_error", Kind::rename_error},
        {"list_error", Kind::list_error},
        {"thread_error", Kind::thread_error},
        {"killed", Kind::killed},
        {"recorded", Kind::recorded},
    };
    const auto known = kinds.find(kind);
    if (known == kinds.end()) throw BadStoreArgument("expected a kind of fault; got '" + kind + "'");
    armed = Kind::none;
    first = nth;
    last = nth + times;
    const long before = seen.exchange(0);
    armed = known->second;
    return before;
}

std::vector<std::string> record() {
    std::lock_guard lock(mutex);
    return std::move(calls);
}

void change(const char* call, const std::string& path) {
    if (hit(Kind::killed)) std::raise(SIGKILL);
    if (!hit(Kind::recorded)) return;
    std::lock_guard lock(mutex);
    calls.push_back(call + (" " + path.substr(path.rfind('/') + 1)));
}

bool hit(Kind kind) {
    if (armed.load(std::memory_order_relaxed) != kind) return false;
    const long call = ++seen;
    return call >= first && call < last;
}

}  // namespace mgd::faults
