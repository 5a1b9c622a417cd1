// What csrc/cuda/op.cpp calls of torch, for tensors in host memory: the launchers become CPU ops, and every tensor is
// on device 0. tools/ptx/build.py links these definitions in place of torch's own.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

AOTITorchError __real_aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t,
                                                   TorchLibraryHandle*);
AOTITorchError __wrap_aoti_torch_library_init_impl(const char* name, const char*, const char* file, uint32_t line,
                                                   TorchLibraryHandle* library) {
    return __real_aoti_torch_library_init_impl(name, "CPU", file, line, library);
}

AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
    *index = 0;
    return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) { return AOTI_TORCH_SUCCESS; }
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }

AOTITorchError __wrap_aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return AOTI_TORCH_SUCCESS;
}
}
