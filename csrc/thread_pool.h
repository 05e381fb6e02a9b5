// The one pool of compute threads. The caller works too; pieces are handed out by a counter; a
// thread with nothing to do spins for some tens of microseconds and then sleeps.
//
// Beside a busy neighbour, on Linux, if there is a CPU for each thread: workers stay off the
// caller's CPU, and one that lost its CPU while it holds a piece gets that of a thread that waits
// for it. Threads that somebody else has bound to other CPUs since are left alone.
//
// Safe to call from several threads at once (calls take turns) and from inside a piece of work
// (runs inline on the calling thread).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace specmoeoff {

// Number of threads, the caller included. Starts as the number of CPUs this process may run on.
int NumThreads();

// Takes effect at once: waits for the running call, ends surplus threads. n >= 1.
void SetNumThreads(int n);

// A piece of work: `context` as given, `index` in [0, count).
using PieceFunction = void (*)(void* context, int64_t index);

// Calls f(context, i) once for every i in [0, count), in rising order of start, and returns when
// all have returned. A piece may wait for a piece of lower index, never for a higher one. f must
// not throw.
void ParallelFor(int64_t count, PieceFunction f, void* context);

template <class F>
void ParallelFor(int64_t count, F&& f) {
  ParallelFor(
      count,
      [](void* context, int64_t index) {
        (*static_cast<std::remove_reference_t<F>*>(context))(index);
      },
      static_cast<void*>(&f));
}

// Adds one to a counter that WaitUntilAtLeast() looks at.
inline void CountDone(int64_t* done) { __atomic_fetch_add(done, 1, __ATOMIC_ACQ_REL); }

// Waits until `*done >= wanted`: spins shortly, then sleeps in small steps.
void WaitUntilAtLeast(const int64_t* done, int64_t wanted);

// This thread's scratch memory, 64-byte aligned, grown to at least `bytes` and kept. Contents are
// whatever was left there. One user at a time: a nested use gets the same memory.
void* ThreadScratch(size_t bytes);

// The same for the thread that makes a call: memory its pieces share, distinct from
// ThreadScratch().
void* CallScratch(size_t bytes);

}  // namespace specmoeoff
