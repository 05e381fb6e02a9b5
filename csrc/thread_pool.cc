#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace specmoeoff {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(30);

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Spins until ready() or kSpin has passed; returns the last ready().
template <class Ready>
bool SpinFor(Ready ready) {
  const auto deadline = Clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      Pause();
    }
    if (Clock::now() >= deadline) return ready();
  }
}

thread_local bool inside_piece = false;

class Pool {
 public:
  explicit Pool(int num_threads) { Start(num_threads); }

  int size() const { return num_threads_.load(std::memory_order_relaxed); }

  void Resize(int num_threads) {
    std::lock_guard<std::mutex> turn(turn_);
    if (num_threads == size()) return;
    Stop();
    Start(num_threads);
  }

  void Run(int64_t count, PieceFunction f, void* context) {
    if (count <= 0) return;
    if (count == 1 || inside_piece || size() == 1) {
      RunInline(count, f, context);
      return;
    }
    std::lock_guard<std::mutex> turn(turn_);
    if (workers_.empty()) {
      RunInline(count, f, context);
      return;
    }
    for (int64_t first = 0; first < count; first += kMostPieces) {
      RunShared(first, std::min(count - first, kMostPieces), f, context);
    }
  }

 private:
  static void RunInline(int64_t count, PieceFunction f, void* context) {
    for (int64_t i = 0; i < count; ++i) f(context, i);
  }

  void RunShared(int64_t first, int64_t count, PieceFunction f, void* context) {
    first_ = first;
    f_ = f;
    context_ = context;
    completed_.store(0, std::memory_order_relaxed);
    epoch_ += 1;
    tickets_.store(epoch_ << (2 * kCountBits) | static_cast<uint64_t>(count) << kCountBits,
                   std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    inside_piece = true;
    Work();
    inside_piece = false;
    // Only pieces that somebody took are waited for: a worker that never woke holds nobody up.
    const auto finished = [=, this] { return completed_.load(std::memory_order_seq_cst) == count; };
    if (!SpinFor(finished)) {
      std::unique_lock<std::mutex> lock(mutex_);
      caller_waits_.store(true, std::memory_order_seq_cst);
      finished_.wait(lock, finished);
      caller_waits_.store(false, std::memory_order_relaxed);
    }
  }

  // A ticket is (epoch, pieces, next piece) in one word, so a worker that comes late cannot take
  // a piece of a call that is over: what it read no longer stands there.
  static bool HasPiece(uint64_t tickets) {
    return (tickets & kCountMask) < (tickets >> kCountBits & kCountMask);
  }

  bool HasPiece() const { return HasPiece(tickets_.load(std::memory_order_seq_cst)); }

  void Work() {
    for (;;) {
      uint64_t tickets = tickets_.load(std::memory_order_acquire);
      if (!HasPiece(tickets)) return;
      if (!tickets_.compare_exchange_weak(tickets, tickets + 1, std::memory_order_acq_rel))
        continue;
      // Holding a piece, we keep its call from returning: what describes the call stays.
      const auto count = static_cast<int64_t>(tickets >> kCountBits & kCountMask);
      f_(context_, first_ + static_cast<int64_t>(tickets & kCountMask));
      if (completed_.fetch_add(1, std::memory_order_seq_cst) + 1 == count &&
          caller_waits_.load(std::memory_order_seq_cst)) {
        // The caller may be between its last look and its sleep; the lock orders us after it.
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  void Start(int num_threads) {
    stop_ = false;
    for (int i = 1; i < num_threads; ++i) {
      workers_.emplace_back([this] { Loop(); });
    }
    num_threads_.store(num_threads, std::memory_order_relaxed);
  }

  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  void Loop() {
    inside_piece = true;
    for (;;) {
      if (!SpinFor([this] { return HasPiece(); })) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [this] { return HasPiece() || stop_; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        if (stop_) return;
      }
      Work();
    }
  }

  static constexpr int kCountBits = 20;
  static constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
  static constexpr int64_t kMostPieces = static_cast<int64_t>(kCountMask);

  std::mutex turn_;  // held by the call that is running
  PieceFunction f_ = nullptr;
  void* context_ = nullptr;
  int64_t first_ = 0;
  uint64_t epoch_ = 0;
  alignas(64) std::atomic<uint64_t> tickets_{0};
  alignas(64) std::atomic<int64_t> completed_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> num_threads_{1};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  std::atomic<bool> caller_waits_{false};
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

int AvailableCpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

// Never destroyed: at interpreter exit its threads sleep, and the process ends them.
Pool& ThePool() {
  static Pool* const pool = new Pool(AvailableCpus());
  return *pool;
}

class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* Grow(size_t bytes) {
    if (bytes_ >= bytes) return memory_;
    std::free(memory_);
    bytes_ = (bytes + 4095) / 4096 * 4096;
    memory_ = std::aligned_alloc(64, bytes_);
    if (!memory_) {
      bytes_ = 0;
      throw std::bad_alloc();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace

int NumThreads() { return ThePool().size(); }

void SetNumThreads(int n) { ThePool().Resize(n); }

void ParallelFor(int64_t count, PieceFunction f, void* context) {
  ThePool().Run(count, f, context);
}

void WaitUntilAtLeast(const int64_t* done, int64_t wanted) {
  const auto ready = [=] { return __atomic_load_n(done, __ATOMIC_ACQUIRE) >= wanted; };
  if (SpinFor(ready)) return;
  // Rare: the thread we wait for has lost its core. Leave ours to whoever needs it.
  while (!ready()) std::this_thread::sleep_for(std::chrono::microseconds(20));
}

void* ThreadScratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.Grow(bytes);
}

void* CallScratch(size_t bytes) {
  thread_local Scratch scratch;
  return scratch.Grow(bytes);
}

}  // namespace specmoeoff
