#include "../network.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dsp {

namespace {

struct Isa {
    std::string name;
    bool supported;
    const Kernels& (*kernels)();
};

std::vector<Isa> compiled_isas() { // best first
    std::vector<Isa> list;
#if defined(__x86_64__)
    // These ask the operating system too: it must save the wide registers.
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#if defined(DSP_HAS_AVX512_VNNI)
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#if defined(DSP_HAS_AVX512_BF16)
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#if defined(DSP_HAS_AVX512_FP16)
    // Bit 23 of EDX in leaf 7: clang 14 has the instructions but not the name for __builtin_cpu_supports.
    unsigned a, b, c, d;
    const bool fp16 = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
    list.push_back({"avx512_fp16", bf16 && fp16, kernels_avx512_fp16});
#endif
    list.push_back({"avx512_bf16", bf16, kernels_avx512_bf16});
#endif
    list.push_back({"avx512_vnni", vnni, kernels_avx512_vnni});
#endif
    list.push_back({"avx512", avx512, kernels_avx512});
    list.push_back({"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), kernels_avx2});
#endif
    list.push_back({"base", true, kernels_base});
    return list;
}

} // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : compiled_isas())
        if (isa.supported) names.push_back(isa.name);
    return names;
}

const Kernels& kernels_for(const std::string& wanted) {
    std::string known;
    for (const Isa& isa : compiled_isas()) {
        if (!isa.supported) continue;
        if (wanted.empty() || isa.name == wanted) return isa.kernels();
        known += (known.empty() ? "" : ", ") + isa.name;
    }
    throw std::invalid_argument("instruction set '" + wanted + "' is not supported; this CPU has " + known);
}

} // namespace dsp
