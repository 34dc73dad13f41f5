// Bytes and busy seconds of one kind of work; time during which several threads work counts once.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>

namespace mgd {

class Meter {
  public:
    struct Reading {
        uint64_t bytes;
        double seconds;
    };

    // The work lasts from construction to destruction; its bytes count only when it succeeded.
    class Span {
      public:
        Span(Meter& meter, uint64_t bytes) : meter_(meter), bytes_(bytes) { meter_.begin(); }
        ~Span() { meter_.end(done_ ? bytes_ : 0); }
        void done() { done_ = true; }

      private:
        Meter& meter_;
        uint64_t bytes_;
        bool done_ = false;
    };

    Reading reading() const {
        std::lock_guard lock(mutex_);
        return {bytes_, seconds_};
    }

  private:
    using Clock = std::chrono::steady_clock;

    void begin() {
        std::lock_guard lock(mutex_);
        if (active_++ == 0) start_ = Clock::now();
    }
    void end(uint64_t bytes) {
        std::lock_guard lock(mutex_);
        bytes_ += bytes;
        if (--active_ == 0) seconds_ += std::chrono::duration<double>(Clock::now() - start_).count();
    }

    mutable std::mutex mutex_;
    uint64_t bytes_ = 0;
    double seconds_ = 0;
    int active_ = 0;
    Clock::time_point start_;
};

}  // namespace mgd
