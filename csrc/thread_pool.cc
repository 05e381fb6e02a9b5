#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>

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
    f_ = f;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    working_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    inside_piece = true;
    Work();
    inside_piece = false;
    const auto finished = [this] { return working_.load(std::memory_order_acquire) == 0; };
    if (!SpinFor(finished)) {
      std::unique_lock<std::mutex> lock(mutex_);
      caller_waits_ = true;
      finished_.wait(lock, finished);
      caller_waits_ = false;
    }
  }

 private:
  static void RunInline(int64_t count, PieceFunction f, void* context) {
    for (int64_t i = 0; i < count; ++i) f(context, i);
  }

  void Work() {
    for (;;) {
      const int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= count_) return;
      f_(context_, index);
    }
  }

  void Start(int num_threads) {
    stop_ = false;
    for (int i = 1; i < num_threads; ++i) {
      workers_.emplace_back([this, seen = round_.load()] { Loop(seen); });
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

  void Loop(uint64_t seen) {
    inside_piece = true;
    for (;;) {
      const auto called = [&] { return round_.load(std::memory_order_seq_cst) != seen; };
      if (!SpinFor(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return called() || stop_; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        if (!called()) return;
      }
      ++seen;
      Work();
      if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        // The caller may be between its last look and its sleep; the lock orders us after it.
        std::lock_guard<std::mutex> lock(mutex_);
        if (caller_waits_) finished_.notify_one();
      }
    }
  }

  std::mutex turn_;  // held by the call that is running
  PieceFunction f_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> working_{0};
  alignas(64) std::atomic<uint64_t> round_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> num_threads_{1};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  bool caller_waits_ = false;
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
