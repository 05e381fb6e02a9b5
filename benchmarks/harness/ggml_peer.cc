// llama.cpp's products on demand: a process that kernel_peers.py starts and asks for timings.
//
//   ggml-peer linear  K N     COUNT THREADS DIRECTORY   MUL_MAT over COUNT copies of one matrix
//   ggml-peer experts K INNER COUNT THREADS DIRECTORY   gate, up, SwiGLU and down of COUNT experts
//
// DIRECTORY/weights has bfloat16 bits: the matrix [N, K], or gate [INNER, K], up [INNER, K] and
// down [K, INNER] of the expert that all are copies of. DIRECTORY/x has float32 activations [rows,
// K], for the most rows that are asked for. A request is a line "rows seconds"; the answer is the
// best time of a run within so many seconds, in seconds, and DIRECTORY/ggml.out the float32 result
// of the last run: [rows, N], or [rows, COUNT, K], as the sum over experts is left out.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

#include "ggml-cpu.h"
#include "ggml.h"

namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  bool experts;
  int64_t k;
  int64_t n;
  int64_t count;
  int threads;
  std::string directory;
};

// Memory for the life of the process, or of a request where `arena` collects it.
char* Allocate(size_t bytes, std::vector<char*>* arena = nullptr) {
  constexpr size_t kAlignment = 4096;
  char* memory = static_cast<char*>(
      std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment));
  if (memory == nullptr) std::exit(3);
  if (arena != nullptr) arena->push_back(memory);
  return memory;
}

// Reads as many bytes as asked for, or ends the process with a message.
void Read(std::ifstream& file, char* to, size_t bytes) {
  if (!file.read(to, static_cast<std::streamsize>(bytes))) {
    std::cerr << "a file of weights or activations is too short\n";
    std::exit(2);
  }
}

// `count` copies, one after the other, of the next [n, k] matrix of the file.
char* ReadCopies(std::ifstream& file, int64_t n, int64_t k, int64_t count) {
  const size_t bytes = static_cast<size_t>(n * k) * sizeof(uint16_t);
  char* copies = Allocate(bytes * static_cast<size_t>(count));
  Read(file, copies, bytes);
  for (int64_t i = 1; i < count; ++i) std::memcpy(copies + bytes * i, copies, bytes);
  return copies;
}

// One request's tensors and graphs.
class Work {
 public:
  Work() : context_(ggml_init({64 << 20, nullptr, /*no_alloc=*/true})) {}
  ~Work() {
    ggml_free(context_);
    for (char* memory : arena_) std::free(memory);
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  ggml_context* context() { return context_; }

  ggml_tensor* Input(ggml_type type, int64_t a, int64_t b, int64_t c, void* data) {
    ggml_tensor* tensor = ggml_new_tensor_3d(context_, type, a, b, c);
    tensor->data = data;
    return tensor;
  }

  // Gives a result memory of its own, or that of an equal result.
  ggml_tensor* Result(ggml_tensor* tensor, void* shared = nullptr) {
    tensor->data = shared != nullptr ? shared : Allocate(ggml_nbytes(tensor), &arena_);
    return tensor;
  }

  void* Scratch(size_t bytes) { return Allocate(bytes, &arena_); }

  void Add(ggml_tensor* result, int threads) {
    ggml_cgraph* graph = ggml_new_graph_custom(context_, 8, false);
    ggml_build_forward_expand(graph, result);
    ggml_cplan plan = ggml_graph_plan(graph, threads, nullptr);
    if (plan.work_size > 0) plan.work_data = static_cast<uint8_t*>(Scratch(plan.work_size));
    graphs_.push_back(graph);
    plans_.push_back(plan);
    last_ = result;
  }

  // Runs the next graph.
  void Run() {
    const size_t i = runs_++ % graphs_.size();
    if (ggml_graph_compute(graphs_[i], &plans_[i]) != GGML_STATUS_SUCCESS) std::exit(4);
  }

  const ggml_tensor* result() const { return last_; }

 private:
  ggml_context* context_;
  std::vector<char*> arena_;
  std::vector<ggml_cgraph*> graphs_;
  std::vector<ggml_cplan> plans_;
  ggml_tensor* last_ = nullptr;
  size_t runs_ = 0;
};

struct Weights {
  char* gate;  // The matrix itself where there are no experts.
  char* up;
  char* down;
};

void BuildLinear(const Options& o, const Weights& w, int64_t rows, char* x, Work* work) {
  ggml_tensor* input = work->Input(GGML_TYPE_F32, o.k, rows, 1, x);
  void* out = work->Scratch(static_cast<size_t>(rows * o.n) * sizeof(float));
  for (int64_t i = 0; i < o.count; ++i) {
    char* matrix = w.gate + static_cast<size_t>(i * o.n * o.k) * sizeof(uint16_t);
    ggml_tensor* weight = work->Input(GGML_TYPE_BF16, o.k, o.n, 1, matrix);
    work->Add(work->Result(ggml_mul_mat(work->context(), weight, input), out), o.threads);
  }
}

// Every expert works on every row, as where a router picks all of them.
void BuildExperts(const Options& o, const Weights& w, int64_t rows, char* x, Work* work) {
  ggml_context* context = work->context();
  auto* ids = static_cast<int32_t*>(work->Scratch(static_cast<size_t>(rows * o.count) * 4));
  for (int64_t i = 0; i < rows * o.count; ++i) ids[i] = static_cast<int32_t>(i % o.count);
  ggml_tensor* picked = ggml_new_tensor_2d(context, GGML_TYPE_I32, o.count, rows);
  picked->data = ids;
  ggml_tensor* input = work->Input(GGML_TYPE_F32, o.k, 1, rows, x);
  ggml_tensor* gates = work->Input(GGML_TYPE_BF16, o.k, o.n, o.count, w.gate);
  ggml_tensor* ups = work->Input(GGML_TYPE_BF16, o.k, o.n, o.count, w.up);
  ggml_tensor* downs = work->Input(GGML_TYPE_BF16, o.n, o.k, o.count, w.down);
  ggml_tensor* gate = work->Result(ggml_mul_mat_id(context, gates, input, picked));
  ggml_tensor* up = work->Result(ggml_mul_mat_id(context, ups, input, picked));
  ggml_tensor* hidden = work->Result(ggml_swiglu_split(context, gate, up));
  work->Add(work->Result(ggml_mul_mat_id(context, downs, hidden, picked)), o.threads);
}

double BestSeconds(Work* work, double seconds) {
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  work->Run();
  double best = 1e30;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    work->Run();
    best = std::min(best, since(start));
  } while (since(begin) < seconds);
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: ggml-peer linear|experts K N COUNT THREADS DIRECTORY\n";
    return 2;
  }
  const Options o = {std::strcmp(argv[1], "experts") == 0,
                     std::atoll(argv[2]),
                     std::atoll(argv[3]),
                     std::atoll(argv[4]),
                     std::atoi(argv[5]),
                     argv[6]};
  ggml_cpu_init();
  std::ifstream weights_file(o.directory + "/weights", std::ios::binary);
  Weights w = {ReadCopies(weights_file, o.n, o.k, o.count), nullptr, nullptr};
  if (o.experts) {
    w.up = ReadCopies(weights_file, o.n, o.k, o.count);
    w.down = ReadCopies(weights_file, o.k, o.n, o.count);
  }
  std::cout << "ready" << std::endl;
  int64_t rows;
  double seconds;
  while (std::cin >> rows >> seconds) {
    const size_t x_bytes = static_cast<size_t>(rows * o.k) * sizeof(float);
    Work work;
    char* x = static_cast<char*>(work.Scratch(x_bytes));
    std::ifstream x_file(o.directory + "/x", std::ios::binary);
    Read(x_file, x, x_bytes);
    (o.experts ? BuildExperts : BuildLinear)(o, w, rows, x, &work);
    const double best = BestSeconds(&work, seconds);
    std::ofstream out(o.directory + "/ggml.out", std::ios::binary);
    out.write(static_cast<const char*>(work.result()->data),
              static_cast<std::streamsize>(ggml_nbytes(work.result())));
    out.close();
    std::cout << best << std::endl;
  }
  return 0;
}
