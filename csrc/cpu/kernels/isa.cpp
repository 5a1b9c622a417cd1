#include "../network.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dsp {

#if defined(DSP_HAS_AVX512_FP16)
namespace {

// Bit 23 of EDX in leaf 7: clang 14 has the instructions and not the name for __builtin_cpu_supports.
bool has_fp16() {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
}

} // namespace
#endif

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    // These ask the operating system too: it must save the wide registers.
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(DSP_HAS_AVX512_FP16)
        if (has_fp16() && __builtin_cpu_supports("avx512bf16")) names.push_back("avx512_fp16");
#endif
#if defined(DSP_HAS_AVX512_BF16)
        if (__builtin_cpu_supports("avx512bf16")) names.push_back("avx512_bf16");
#endif
        names.push_back("avx512");
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
    names.push_back("base");
    return names;
}

const Kernels& kernels_for(const std::string& isa) {
    const auto names = available_isas();
    const std::string& wanted = isa.empty() ? names.front() : isa;
    std::string known;
    for (const auto& name : names) {
        known += (known.empty() ? "" : ", ") + name;
        if (name != wanted) continue;
#if defined(__x86_64__)
#if defined(DSP_HAS_AVX512_FP16)
        if (name == "avx512_fp16") return kernels_avx512_fp16();
#endif
#if defined(DSP_HAS_AVX512_BF16)
        if (name == "avx512_bf16") return kernels_avx512_bf16();
#endif
        if (name == "avx512") return kernels_avx512();
        if (name == "avx2") return kernels_avx2();
#endif
        return kernels_base();
    }
    throw std::invalid_argument("instruction set '" + wanted + "' does not run here; this CPU has " + known);
}

} // namespace dsp
