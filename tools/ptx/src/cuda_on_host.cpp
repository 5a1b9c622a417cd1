// The CUDA runtime that the launchers of csrc/cuda are linked against.
#include <map>
#include <set>
#include <string>
#include <vector>

#include "machine.h"

namespace {

constexpr int kMostSharedMemoryPerBlock = 97, kMaxDynamicSharedMemorySize = 8;  // attributes
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidFunction = 98;

struct Dim3 {
    unsigned x, y, z;
};
struct Configuration {
    Dim3 grid, block;
    size_t shared;
    void* stream;
};

// By the address of a kernel's function on the host. The objects that nvcc made fill it before main.
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> registered;
    return registered;
}
std::set<const void*> granted;  // kernels that may have more than 48 KB of shared memory
std::vector<Configuration> configurations;
int last_error = kSuccess;

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    names()[host] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
    configurations.push_back({grid, block, shared, stream});
    return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
    const Configuration c = configurations.back();
    configurations.pop_back();
    *grid = c.grid, *block = c.block, *shared = c.shared, *static_cast<void**>(stream) = c.stream;
    return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
    *kernel = const_cast<void*>(host);
    return names().count(host) ? kSuccess : kInvalidFunction;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
    if (!names().count(kernel)) return last_error = kInvalidFunction;
    if (grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1)
        throw std::runtime_error("PTX interpreter: a grid or thread block of more than one dimension");
    return last_error = ptx::launch(names()[kernel], grid.x, block.x, shared, granted.count(kernel) > 0, arguments);
}

int cudaDeviceGetAttribute(int* value, int attribute, int) {
    if (attribute != kMostSharedMemoryPerBlock) return kInvalidValue;
    *value = ptx::session().options.shared_limit;
    return kSuccess;
}
int cudaFuncSetAttribute(const void* host, int attribute, int value) {
    if (attribute != kMaxDynamicSharedMemorySize || !names().count(host) || value > ptx::session().options.shared_limit)
        return last_error = kInvalidValue;
    granted.insert(host);
    return kSuccess;
}
int cudaGetLastError() {
    const int error = last_error;
    last_error = kSuccess;
    return error;
}
const char* cudaGetErrorString(int error) {
    if (error == kInvalidValue) return "invalid argument";
    return error == kInvalidFunction ? "invalid device function" : "error";
}
int cudaSetDevice(int) { return kSuccess; }
}
