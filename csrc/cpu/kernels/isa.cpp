#include "../network.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dsp {

namespace {

struct Isa {
    std::string name;
    bool supported;
    const Kernels& (*kernels)();
};

#if defined(DSP_HAS_AVX512_AMX) && defined(DSP_HAS_AVX512_FP16)
// Whether the CPU has AMX for bytes and bfloat16, the operating system saves its registers, and Linux lets this process
// use them, which it must ask for once.
bool asked_for_matrices() {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false; // XGETBV
    unsigned low, high;
    asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool tile = d >> 24 & 1, int8 = d >> 25 & 1, bf16 = d >> 22 & 1;
    constexpr long request_permission = 0x1023, tile_data = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return tile && int8 && bf16 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

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
#if defined(DSP_HAS_AVX512_AMX)
    static const bool matrices = asked_for_matrices();
    list.push_back({"avx512_amx", bf16 && fp16 && matrices, kernels_avx512_amx});
#endif
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
