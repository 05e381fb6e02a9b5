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
// How long a thread that waits for others sleeps at a time, to look after them in between. Of a nap
// that nobody ends it looks several times whether it still has to wait.
constexpr auto kNap = std::chrono::microseconds(100);
constexpr auto kStep = kNap / 5;
constexpr int kMostWatched = 64;  // workers; those beyond are left to the scheduler

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

#if defined(__linux__)
int CurrentCpu() { return sched_getcpu(); }

using CpuSet = cpu_set_t;
CpuSet AllowedCpus() {
  CpuSet set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) CPU_ZERO(&set);
  return set;
}

// A thread of the pool, as the others see it.
class Worker {
 public:
  // Odd while it has a piece and is not waiting for others; another odd number each time.
  std::atomic<uint32_t> stretch{0};

  void Start(std::thread thread) { thread_ = std::move(thread); }
  void Join() { thread_.join(); }

  std::chrono::nanoseconds CpuTime() {
    clockid_t clock;
    timespec time{};
    if (pthread_getcpuclockid(thread_.native_handle(), &clock) == 0) clock_gettime(clock, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  }

  void MoveTo(int cpu, const CpuSet& allowed) {
    if (!CPU_ISSET(cpu, &allowed)) return;
    CpuSet only;
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    Visit(only, allowed);
  }

  void MoveAwayFrom(int cpu, const CpuSet& allowed) {
    CpuSet others = allowed;
    CPU_CLR(cpu, &others);
    Visit(others, allowed);
  }

 private:
  // The scheduler moves a thread at once when it must; afterwards it may move it as before. A
  // thread that somebody else has given other CPUs is left alone.
  void Visit(const CpuSet& there, const CpuSet& allowed) {
    std::unique_lock<std::mutex> lock(visit_, std::try_to_lock);
    if (!lock) return;
    const pthread_t thread = thread_.native_handle();
    CpuSet now;
    if (pthread_getaffinity_np(thread, sizeof(now), &now) != 0 || !CPU_EQUAL(&now, &allowed))
      return;
    if (pthread_setaffinity_np(thread, sizeof(there), &there) != 0) return;
    pthread_setaffinity_np(thread, sizeof(allowed), &allowed);
  }

  std::thread thread_;
  std::mutex visit_;
};
#else
// Elsewhere threads are left to the scheduler.
int CurrentCpu() { return -1; }

struct CpuSet {};
CpuSet AllowedCpus() { return {}; }

class Worker {
 public:
  std::atomic<uint32_t> stretch{0};
  void Start(std::thread thread) { thread_ = std::move(thread); }
  void Join() { thread_.join(); }
  std::chrono::nanoseconds CpuTime() { return {}; }
  void MoveTo(int, const CpuSet&) {}
  void MoveAwayFrom(int, const CpuSet&) {}

 private:
  std::thread thread_;
};
#endif

thread_local bool inside_piece = false;
thread_local Worker* this_worker = nullptr;  // null in callers

int AvailableCpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned n = std::thread::hardware_concurrency();
  return n ? static_cast<int>(n) : 1;
}

class Pool {
 public:
  explicit Pool(int num_threads) { Start(num_threads); }

  int size() const { return num_threads_.load(std::memory_order_relaxed); }

  // Calls sleep(), which leaves this CPU to others for about kNap, or until ready(). A worker that
  // had a piece all the while and next to no CPU has lost its own to a neighbour: it gets this one,
  // which does nothing.
  template <class Sleep, class Ready>
  void LookAfter(Sleep sleep, Ready ready) {
    struct Seen {
      uint32_t stretch;
      std::chrono::nanoseconds cpu_time;
    } seen[kMostWatched];
    const size_t watched = watches_ ? std::min<size_t>(workers_.size(), kMostWatched) : 0;
    for (size_t i = 0; i < watched; ++i) {
      seen[i].stretch = workers_[i]->stretch.load(std::memory_order_relaxed);
      if (IsOdd(seen[i].stretch)) seen[i].cpu_time = workers_[i]->CpuTime();
    }
    const bool computes = this_worker && IsOdd(this_worker->stretch);
    if (computes) ToggleStretch();
    const auto began = Clock::now();
    sleep();
    const auto slept = Clock::now() - began;
    if (computes) ToggleStretch();
    if (ready()) return;
    for (size_t i = 0; i < watched; ++i) {
      Worker& worker = *workers_[i];
      if (&worker == this_worker || !IsOdd(seen[i].stretch)) continue;
      if (worker.stretch.load(std::memory_order_relaxed) != seen[i].stretch) continue;
      if (worker.CpuTime() - seen[i].cpu_time > slept / 4) continue;
      return worker.MoveTo(CurrentCpu(), allowed_);
    }
  }

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
      caller_waits_.store(true, std::memory_order_seq_cst);
      const auto sleep = [&] {
        std::unique_lock<std::mutex> lock(mutex_);
        finished_.wait_for(lock, kNap, finished);
      };
      while (!finished()) LookAfter(sleep, finished);
      caller_waits_.store(false, std::memory_order_relaxed);
    }
  }

  // A ticket is (epoch, pieces, next piece) in one word, so a worker that comes late cannot take
  // a piece of a call that is over: what it read no longer stands there.
  static bool HasPiece(uint64_t tickets) {
    return (tickets & kCountMask) < (tickets >> kCountBits & kCountMask);
  }

  // Whether some piece of the last call is not done.
  bool IsRunning() const {
    const uint64_t tickets = tickets_.load(std::memory_order_seq_cst);
    const auto count = static_cast<int64_t>(tickets >> kCountBits & kCountMask);
    return completed_.load(std::memory_order_seq_cst) < count;
  }

  bool HasPiece() const { return HasPiece(tickets_.load(std::memory_order_seq_cst)); }

  void Work() {
    for (;;) {
      KeepApart();
      uint64_t tickets = tickets_.load(std::memory_order_acquire);
      if (!HasPiece(tickets)) return;
      if (!tickets_.compare_exchange_weak(tickets, tickets + 1, std::memory_order_acq_rel))
        continue;
      // Holding a piece, we keep its call from returning: what describes the call stays.
      const auto count = static_cast<int64_t>(tickets >> kCountBits & kCountMask);
      ToggleStretch();
      f_(context_, first_ + static_cast<int64_t>(tickets & kCountMask));
      ToggleStretch();
      if (completed_.fetch_add(1, std::memory_order_seq_cst) + 1 == count &&
          caller_waits_.load(std::memory_order_seq_cst)) {
        // The caller may be between its last look and its sleep; the lock orders us after it.
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  static bool IsOdd(uint32_t stretch) { return stretch % 2 != 0; }
  static void ToggleStretch() {
    if (this_worker) this_worker->stretch.fetch_add(1, std::memory_order_relaxed);
  }

  // To a scheduler two of ours on one CPU and a neighbour's thread on the other are as even as one
  // of ours on each; to us they are a core less. So workers leave the CPU that the caller is on.
  void KeepApart() {
    const int cpu = CurrentCpu();
    const bool with_caller = cpu == caller_cpu_.load(std::memory_order_relaxed);
    if (!this_worker) {
      if (!with_caller) caller_cpu_.store(cpu, std::memory_order_relaxed);
    } else if (watches_ && with_caller) {
      this_worker->MoveAwayFrom(cpu, allowed_);
    }
  }

  void Start(int num_threads) {
    stop_ = false;
    allowed_ = AllowedCpus();
    watches_ = num_threads <= AvailableCpus();
    num_threads_.store(1, std::memory_order_relaxed);
    for (int i = 1; i < num_threads; ++i) {
      auto worker = std::make_unique<Worker>();
      worker->Start(std::thread([this, it = worker.get()] { Loop(it); }));
      workers_.push_back(std::move(worker));
      num_threads_.store(i + 1, std::memory_order_relaxed);
    }
  }

  void Stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      wake_.notify_all();
    }
    for (const auto& worker : workers_) worker->Join();
    workers_.clear();
  }

  void Loop(Worker* self) {
    inside_piece = true;
    this_worker = self;
    for (;;) {
      if (!SpinFor([this] { return HasPiece(); })) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        const auto wanted = [this] { return HasPiece() || stop_; };
        // While others compute this CPU falls idle again and again. Each time the scheduler looks
        // for a thread that waits for a CPU, which may be the caller.
        while (!wanted() && IsRunning()) wake_.wait_for(lock, kNap, wanted);
        wake_.wait(lock, wanted);
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
  alignas(64) std::atomic<int> caller_cpu_{-1};
  std::atomic<int> sleeping_{0};
  std::atomic<int> num_threads_{1};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable finished_;
  std::atomic<bool> caller_waits_{false};
  bool stop_ = false;
  CpuSet allowed_;
  bool watches_ = false;  // there is a CPU for each thread
  std::vector<std::unique_ptr<Worker>> workers_;
};

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
  // Rare: the thread we wait for has lost its core.
  const auto sleep = [&] {
    for (auto slept = kStep.zero(); slept < kNap && !ready(); slept += kStep) {
      std::this_thread::sleep_for(kStep);
    }
  };
  while (!ready()) ThePool().LookAfter(sleep, ready);
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
