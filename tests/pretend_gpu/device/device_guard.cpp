// Registers a device guard for CUDA that does nothing, for builds of torch without CUDA. Without any, operators on fake
// CUDA tensors that have no kernel for "meta" (copy_ among them, and so every slice's gradient) fail with "PyTorch is not
// linked with support for cuda devices". It counts no devices, so that autograd starts no threads for them.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override {
    return 0;
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

}  // namespace
