// The functions of fedtt_executorch.h on ExecuTorch's C++ runtime.
//
// Memory is what this file is about. Weights stay in the mapped file. The buffers that activations are planned in
// are as large as the largest batch needs, and are mapped without being touched, so that a small batch makes
// only the pages resident that it writes; the runtime's own `Module` would fill them with zeros.

#include "fedtt_executorch.h"

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/extension/threadpool/threadpool_guard.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#ifdef FEDTT_PROFILE
#include <executorch/devtools/etdump/etdump_flatcc.h>
#endif

#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

using executorch::aten::ScalarType;
using executorch::aten::TensorImpl;
using executorch::extension::FlatTensorDataMap;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::extension::threadpool::NoThreadPoolGuard;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::HierarchicalAllocator;
using executorch::runtime::MemoryManager;
using executorch::runtime::Method;
using executorch::runtime::Program;
using executorch::runtime::Result;
using executorch::runtime::Span;

#ifndef FEDTT_EXECUTORCH_VERSION
#error "build.py passes the version of the SDK"
#endif

// Not among the headers that the wheel ships, but exported by its library.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

std::atomic<bool> one_thread{true};
thread_local std::string last_log;  // what the runtime said last, on this thread, about an error

void keep_log(
    et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* text, size_t size) {
  if (level == kError || level == kFatal) {
    try {
      if (!last_log.empty()) last_log += "; ";
      last_log.append(text, size);
    } catch (...) {  // no memory for words: the error's number is left
    }
  }
}

// What XNNPACK computes between its inputs and outputs lies in one place for all calls, not one for each.
void share_workspace() {
  executorch::runtime::BackendOption option;
  std::snprintf(option.key, sizeof option.key, "workspace_sharing_mode");
  option.value = 2;  // WorkspaceSharingMode::Global, in a header that the wheel does not ship
  (void)executorch::runtime::set_option("XnnpackBackend", {&option, 1});
}

void start() {
  static const bool started = [] {
    executorch::runtime::register_pal(executorch::runtime::PalImpl::create(keep_log, __FILE__));
    executorch::runtime::runtime_init();
    share_workspace();
    return true;
  }();
  (void)started;
  last_log.clear();
}

int32_t failed(const char* what, Error error, char* out, size_t size) {
  if (out != nullptr && size > 0) {
    std::snprintf(
        out, size, "%s: error 0x%x%s%s", what, static_cast<unsigned>(error), last_log.empty() ? "" : ": ",
        last_log.c_str());
    for (char* c = out; *c != '\0'; ++c) {
      if (static_cast<unsigned char>(*c) < ' ') *c = ' ';
    }
  }
  return static_cast<int32_t>(error);
}

// What `work` returns, or `otherwise` where it throws: no exception may reach callers that are not C++.
template <typename T, typename Work>
T contained(T otherwise, char* error, size_t size, Work&& work) noexcept {
  const char* why = "failed with an exception";
  try {
    return work();
  } catch (const std::bad_alloc&) {
    why = "found no memory";
  } catch (...) {
  }
  if (error != nullptr && size > 0) std::snprintf(error, size, "%s", why);
  return otherwise;
}

constexpr int32_t threw = static_cast<int32_t>(Error::Internal);

// Whether an input is of a known type, with sizes whose bytes can be counted, and has them.
bool is_sound(const fedtt_tensor& t) {
  if (t.dimensions < 0 || t.dimensions > FEDTT_MOST_DIMENSIONS) return false;
  if (t.type != FEDTT_INT32 && t.type != FEDTT_INT64 && t.type != FEDTT_FLOAT32) return false;
  int64_t bytes = t.type == FEDTT_INT64 ? 8 : 4;
  for (int32_t i = 0; i < t.dimensions; ++i) {
    if (t.sizes[i] < 0 || __builtin_mul_overflow(bytes, static_cast<int64_t>(t.sizes[i]), &bytes)) return false;
  }
  return t.data != nullptr || bytes == 0;
}

// Address space that becomes memory where it is first written.
class LazyPages {
 public:
  explicit LazyPages(size_t bytes) : bytes_(bytes == 0 ? 1 : bytes) {
    void* found = mmap(
        nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    data_ = found == MAP_FAILED ? nullptr : static_cast<uint8_t*>(found);
  }
  ~LazyPages() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }
  LazyPages(LazyPages&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  LazyPages(const LazyPages&) = delete;
  LazyPages& operator=(const LazyPages&) = delete;
  LazyPages& operator=(LazyPages&&) = delete;

  Span<uint8_t> span() const { return {data_, data_ == nullptr ? 0 : bytes_}; }

 private:
  size_t bytes_;
  uint8_t* data_;
};

// A tensor over memory of the caller's.
class View {
 public:
  explicit View(const fedtt_tensor& t)
      : impl_(
            static_cast<ScalarType>(t.type), t.dimensions, copied(t), t.data, order_.data(), nullptr,
            executorch::aten::TensorShapeDynamism::STATIC) {}
  EValue value() { return EValue(executorch::aten::Tensor(&impl_)); }

 private:
  int32_t* copied(const fedtt_tensor& t) {
    for (int32_t i = 0; i < t.dimensions; ++i) {
      sizes_[i] = t.sizes[i];
      order_[i] = static_cast<uint8_t>(i);
    }
    return sizes_.data();
  }
  std::array<int32_t, FEDTT_MOST_DIMENSIONS> sizes_{};
  std::array<uint8_t, FEDTT_MOST_DIMENSIONS> order_{};
  TensorImpl impl_;
};

}  // namespace

struct fedtt_program {  // members in the order in which they depend on one another
  std::optional<MmapDataLoader> program_file;
  std::optional<MmapDataLoader> weights_file;
  std::optional<FlatTensorDataMap> weights;
  std::optional<Program> program;
  std::vector<LazyPages> pages;
  std::vector<Span<uint8_t>> spans;
  std::optional<HierarchicalAllocator> planned;
  MallocMemoryAllocator method_memory;
  MallocMemoryAllocator temporary_memory;
  std::optional<MemoryManager> memory;
#ifdef FEDTT_PROFILE
  executorch::etdump::ETDumpGen trace;
#endif
  std::optional<Method> method;

  Error load(const char* file, const char* data);
};

template <typename T>
static Error take(Result<T>&& result, std::optional<T>& into) {
  if (!result.ok()) return result.error();
  into.emplace(std::move(result.get()));
  return Error::Ok;
}

#define FEDTT_TRY(expression)                                 \
  if (const Error error = (expression); error != Error::Ok) { \
    return error;                                             \
  }

Error fedtt_program::load(const char* file, const char* data) {
  constexpr auto mapped = MmapDataLoader::MlockConfig::NoMlock;
  FEDTT_TRY(take(MmapDataLoader::from(file, mapped), program_file));
  FEDTT_TRY(take(Program::load(&*program_file, Program::Verification::InternalConsistency), program));
  if (data != nullptr) {
    FEDTT_TRY(take(MmapDataLoader::from(data, mapped), weights_file));
    FEDTT_TRY(take(FlatTensorDataMap::load(&*weights_file), weights));
  }
  auto about = program->method_meta("forward");
  if (!about.ok()) return about.error();
  for (size_t i = 0; i < about->num_memory_planned_buffers(); ++i) {
    auto size = about->memory_planned_buffer_size(i);
    if (!size.ok()) return size.error();
    pages.emplace_back(static_cast<size_t>(size.get()));
    spans.push_back(pages.back().span());
    if (spans.back().data() == nullptr) return Error::MemoryAllocationFailed;
  }
  planned.emplace(Span<Span<uint8_t>>(spans.data(), spans.size()));
  memory.emplace(&method_memory, &*planned, &temporary_memory);
#ifdef FEDTT_PROFILE
  auto* tracer = &trace;
#else
  constexpr executorch::runtime::EventTracer* tracer = nullptr;
#endif
  return take(program->load_method("forward", &*memory, tracer, weights ? &*weights : nullptr), method);
}

extern "C" {

int32_t fedtt_abi(void) { return FEDTT_EXECUTORCH_ABI; }

const char* fedtt_executorch_version(void) { return FEDTT_EXECUTORCH_VERSION; }

void fedtt_set_threads(uint32_t threads) {
  contained(0, nullptr, 0, [&] {
    start();
    one_thread = true;  // and so it stays where the pool cannot be had
    if (threads > 1) {
      auto* pool = executorch::extension::threadpool::get_threadpool();
      one_thread = pool == nullptr || !pool->_unsafe_reset_threadpool(threads);
    }
    return 0;
  });
}

fedtt_program* fedtt_load(const char* program, const char* weights, char* error, size_t error_bytes) {
  return contained<fedtt_program*>(nullptr, error, error_bytes, [&]() -> fedtt_program* {
    start();
    std::optional<NoThreadPoolGuard> alone;
    if (one_thread) alone.emplace();
    auto found = std::make_unique<fedtt_program>();
    if (const Error code = found->load(program, weights); code != Error::Ok) {
      failed("cannot be loaded", code, error, error_bytes);
      return nullptr;
    }
    return found.release();
  });
}

void fedtt_free(fedtt_program* program) { delete program; }

int32_t fedtt_output_count(const fedtt_program* program) {
  return contained(0, nullptr, 0, [&] { return static_cast<int32_t>(program->method->outputs_size()); });
}

static int32_t run(
    fedtt_program* program, const fedtt_tensor* inputs, int32_t count, char* error, size_t error_bytes) {
  start();
  std::optional<NoThreadPoolGuard> alone;
  if (one_thread) alone.emplace();
  if (static_cast<size_t>(count) != program->method->inputs_size()) {
    last_log = "the program takes " + std::to_string(program->method->inputs_size()) + " inputs";
    return failed("did not run", Error::InvalidArgument, error, error_bytes);
  }
  std::vector<std::unique_ptr<View>> views;
  for (int32_t i = 0; i < count; ++i) {
    if (!is_sound(inputs[i])) {
      return failed("an input has impossible sizes or type, or no data", Error::InvalidArgument, error, error_bytes);
    }
    views.push_back(std::make_unique<View>(inputs[i]));
    if (const Error code = program->method->set_input(views.back()->value(), i); code != Error::Ok) {
      return failed("does not take its inputs", code, error, error_bytes);
    }
  }
  if (const Error code = program->method->execute(); code != Error::Ok) {
    return failed("did not run", code, error, error_bytes);
  }
  return 0;
}

int32_t fedtt_run(
    fedtt_program* program, const fedtt_tensor* inputs, int32_t count, char* error, size_t error_bytes) {
  return contained(threw, error, error_bytes, [&] { return run(program, inputs, count, error, error_bytes); });
}

static int32_t output(const fedtt_program* program, int32_t index, fedtt_tensor* found) {
  if (index < 0 || index >= fedtt_output_count(program)) return static_cast<int32_t>(Error::InvalidArgument);
  const EValue& value = program->method->get_output(index);
  if (!value.isTensor()) return static_cast<int32_t>(Error::InvalidType);
  const auto tensor = value.toTensor();
  if (tensor.dim() > FEDTT_MOST_DIMENSIONS) return static_cast<int32_t>(Error::NotSupported);
  found->data = tensor.mutable_data_ptr();
  found->type = static_cast<int32_t>(tensor.scalar_type());
  found->dimensions = static_cast<int32_t>(tensor.dim());
  for (int32_t i = 0; i < found->dimensions; ++i) found->sizes[i] = static_cast<int32_t>(tensor.size(i));
  return 0;
}

int32_t fedtt_output(const fedtt_program* program, int32_t index, fedtt_tensor* found) {
  return contained(threw, nullptr, 0, [&] { return output(program, index, found); });
}

#ifdef FEDTT_PROFILE
FEDTT_PUBLIC int32_t fedtt_write_profile(fedtt_program* program, const char* path) {
  return contained(threw, nullptr, 0, [&] {
    const auto result = program->trace.get_etdump_data();
    const std::unique_ptr<void, decltype(&std::free)> owned(result.buf, &std::free);
    std::FILE* file = result.buf == nullptr ? nullptr : std::fopen(path, "wb");
    if (file == nullptr) return 1;
    const bool whole = std::fwrite(result.buf, 1, result.size, file) == result.size;
    return std::fclose(file) == 0 && whole ? 0 : 1;
  });
}
#endif

}  // extern "C"
