// A CUDA device that does nothing, or what a CPU does, for builds of torch without CUDA: tensors on it are real ones, whose
// memory is the host's, so that a program runs whole, with autograd's thread for the device and its own addresses. Every
// operator that would launch something arrives at `run`, which notes it and makes what it returns by the operator's meta
// kernel, without values; or with them, by its CPU kernel on the same memory, where that was asked for or where the result
// depends on values. Whatever a host would wait for the device in is told at once.
#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <vector>

namespace {

using at::IntArrayRef;
using at::Tensor;

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype));
}

Tensor empty(
    IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor like(const Tensor& other) {
  return empty_strided(other.sizes(), other.strides(), other.scalar_type(), {}, {}, {});
}

// The same memory as a tensor of the CPU's.
Tensor on_cpu(const Tensor& x) {
  if (x.numel() == 0) { // an operator may make it larger
    return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.scalar_type());
  }
  const auto bytes = x.storage().nbytes();
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(const_cast<void*>(x.storage().data()), c10::kCPU), nullptr, false);
  auto impl = c10::make_intrusive<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), x.dtype());
  impl->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  return Tensor(std::move(impl));
}

Tensor on_meta(const Tensor& x) {
  return at::detail::empty_strided_meta(x.sizes(), x.strides(), x.scalar_type());
}

// A result with room for what `made` holds: operators write into empty tensors that they first make larger.
void take_size(const Tensor& result, const Tensor& made) {
  if (result.sizes() == made.sizes()) {
    return;
  }
  const Tensor room = like(made);
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(room.storage());
  impl->set_sizes_and_strides(room.sizes(), room.strides(), 0);
}

// -- operators --------------------------------------------------------------------------------------------------------

std::string name_of(const c10::OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Whose result, or its size, the host reads.
bool depends_on_values(const std::string& name, const std::vector<c10::IValue>& arguments) {
  static const std::set<std::string> known = {
      "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount", "aten::is_nonzero"};
  if (known.count(name) > 0) {
    return true;
  }
  if (name != "aten::index.Tensor" && name != "aten::index_put_" && name != "aten::_index_put_impl_") {
    return false;
  }
  for (const auto& index : arguments[1].toListRef()) { // a mask is turned into places first
    if (index.isTensor() && index.toTensor().defined() &&
        (index.toTensor().scalar_type() == at::kBool || index.toTensor().scalar_type() == at::kByte)) {
      return true;
    }
  }
  return false;
}

bool returns_what_it_was_given(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns()) {
    if (result.alias_info() == nullptr || !result.alias_info()->isWrite()) {
      return false;
    }
  }
  return true;
}

template <typename Change>
c10::IValue changed(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) {
    return value.toTensor().defined() ? c10::IValue(change(value.toTensor())) : value;
  }
  if (value.isTensorList()) {
    std::vector<Tensor> found;
    for (const Tensor& x : value.toTensorVector()) {
      found.push_back(x.defined() ? change(x) : x);
    }
    return found;
  }
  if (value.isList() && value.toListRef().size() > 0) {
    bool tensors = false;
    for (const auto& item : value.toListRef()) {
      tensors |= item.isTensor();
    }
    if (tensors) {
      c10::List<std::optional<Tensor>> found;
      for (const auto& item : value.toListRef()) {
        found.push_back(
            item.isTensor() && item.toTensor().defined() ? std::optional<Tensor>(change(item.toTensor())) : std::nullopt);
      }
      return found;
    }
  }
  return value;
}

// Results that are arguments written to, found by the schema's alias sets.
std::vector<c10::IValue> given_results(const c10::FunctionSchema& schema, const std::vector<c10::IValue>& arguments) {
  std::vector<c10::IValue> results;
  for (const auto& result : schema.returns()) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && alias->beforeSets() == result.alias_info()->beforeSets()) {
        results.push_back(arguments[i]);
        break;
      }
    }
  }
  return results;
}

bool has_room(const std::vector<c10::IValue>& results) {
  for (const auto& result : results) {
    if (result.isTensor() && result.toTensor().numel() == 0) {
      return false;
    }
  }
  return true;
}

void run(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Timed timed;
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  torch::jit::drop(*stack, count);
  const std::string name = name_of(op);
  note(name);
  const bool by_values = depends_on_values(name, arguments);
  if (by_values) {
    wait(name);
  }
  const bool given = returns_what_it_was_given(schema);
  const auto results = given ? given_results(schema, arguments) : std::vector<c10::IValue>();
  bool on_host = executes || by_values;
  // Of lists nobody above counts the writes: the kernels do.
  const bool list = name.rfind("aten::_foreach_", 0) == 0;
  for (size_t i = 0; list && i < arguments.size(); ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite() && arguments[i].isTensorList()) {
      for (const Tensor& x : arguments[i].toTensorVector()) {
        x.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
  if (given && !on_host && has_room(results)) {
    stack->insert(stack->end(), results.begin(), results.end());
    return;
  }
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  torch::jit::Stack inner;
  if (!on_host) {
    for (const auto& argument : arguments) {
      inner.push_back(changed(argument, on_meta));
    }
    try {
      op.callBoxed(&inner);
    } catch (const c10::NotImplementedError&) {
      on_host = true;
    }
  }
  std::vector<c10::IValue> cpu_arguments;
  if (on_host) {
    inner.clear();
    for (const auto& argument : arguments) {
      cpu_arguments.push_back(changed(argument, [](const Tensor& x) { return x.is_cuda() ? on_cpu(x) : x; }));
    }
    inner.insert(inner.end(), cpu_arguments.begin(), cpu_arguments.end());
    op.callBoxed(&inner);
  }
  if (given) { // into what may have been too small
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].isTensor() && inner[i].isTensor()) {
        const bool grew = results[i].toTensor().sizes() != inner[i].toTensor().sizes();
        take_size(results[i].toTensor(), inner[i].toTensor());
        if (on_host && grew) {
          on_cpu(results[i].toTensor()).copy_(inner[i].toTensor());
        }
      }
    }
    stack->insert(stack->end(), results.begin(), results.end());
    return;
  }
  for (const auto& result : inner) {
    stack->push_back(changed(result, [on_host](const Tensor& x) {
      const Tensor made = like(x);
      if (on_host) {
        on_cpu(made).copy_(x);
      }
      return made;
    }));
  }
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  Timed timed;
  const Tensor& host = self.is_cuda() ? source : self;
  const bool across = self.is_cuda() != source.is_cuda();
  if (across && self.numel() > 0) {
    bool direct = false;
    {
      std::lock_guard<std::mutex> held(lock);
      direct = non_blocking && pinned.count(const_cast<void*>(host.storage().data())) > 0;
    }
    const std::string what = self.is_cuda() ? "upload" : "download";
    note(what);
    if (!direct) {
      wait(what + (host.scalar_type() == at::kBool ? " of a mask" : ""));
    }
  } else {
    note("aten::copy_");
  }
  if (across || executes) {
    c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
    Tensor to = self.is_cuda() ? on_cpu(self) : self;
    to.copy_(source.is_cuda() ? on_cpu(source) : source);
  }
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  Timed timed;
  wait("aten::_local_scalar_dense");
  return on_cpu(self).item();
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
  if (self.sizes() != size) {
    take_size(self, empty(size, self.scalar_type(), {}, {}, {}, format));
  }
  return self;
}

bool is_pinned(const Tensor& self, std::optional<at::Device>) {
  std::lock_guard<std::mutex> held(lock);
  return pinned.count(const_cast<void*>(self.storage().data())) > 0;
}

Tensor pin_memory(const Tensor& self, std::optional<at::Device>) {
  const Tensor copy = self.clone();
  std::lock_guard<std::mutex> held(lock);
  pinned[const_cast<void*>(copy.storage().data())] = copy.storage().nbytes();
  return copy;
}

void record_stream(Tensor&, at::Stream) {}

int64_t sdp_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool, std::optional<double>,
    bool) {
  return mask.has_value() ? 2 : 1; // at::SDPBackend: memory-efficient with a mask, flash attention without
}

// That kernels for all devices are replaced is meant.
struct Silence final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};
Silence silence;
c10::WarningHandler* const loud = [] {
  auto* const before = c10::WarningUtils::get_warning_handler();
  c10::WarningUtils::set_warning_handler(&silence);
  return before;
}();

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

// What is a kernel of CUDA's own though there is one for all devices, which would launch one after the other.
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("aten::_foreach_", 0) == 0) {
      const auto qualified = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
      m.impl(qualified.c_str(), torch::CppFunction::makeFromBoxedFunction<&run>());
    }
  }
  m.impl("empty_strided", &empty_strided);
  m.impl("empty.memory_format", &empty);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("view", &at::native::view);
  m.impl("resize_", &resize_);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("record_stream", &record_stream);
}

TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("is_pinned", &is_pinned);
  m.impl("_pin_memory", &pin_memory);
}

const bool chosen = [] {
  c10::WarningUtils::set_warning_handler(loud);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&sdp_choice);
  return true;
}();

} // namespace

// Takes the place of torch's own, which knows of no accelerator in such a build and would have autograd order nothing: the
// library must be loaded before torch (LD_PRELOAD).
namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::kCUDA;
}
} // namespace at::accelerator

// -- what Python asks -------------------------------------------------------------------------------------------------

extern "C" {

void idle_execute(int on) {
  executes = on != 0;
}

void idle_tell(void (*callback)(const char*)) {
  told = callback;
}

int64_t idle_nanoseconds() {
  std::lock_guard<std::mutex> held(lock);
  return nanoseconds;
}

// Lines "count name"; the caller's buffer, how long it would have to be.
int64_t idle_counts(char* buffer, int64_t size) {
  std::string text;
  {
    std::lock_guard<std::mutex> held(lock);
    for (const auto& [name, count] : counts) {
      text += std::to_string(count) + " " + name + "\n";
    }
  }
  if (buffer != nullptr && size > static_cast<int64_t>(text.size())) {
    std::memcpy(buffer, text.c_str(), text.size() + 1);
  }
  return static_cast<int64_t>(text.size()) + 1;
}

void idle_reset() {
  std::lock_guard<std::mutex> held(lock);
  counts.clear();
  nanoseconds = 0;
}
}
