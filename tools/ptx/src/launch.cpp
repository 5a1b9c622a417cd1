// Launches of grids, and the functions that Python calls.
#include <cstdio>

#include "machine.h"

namespace ptx {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9;
constexpr size_t kShownErrors = 12, kMostErrors = 1000;

Session& session() {
    static Session made;
    return made;
}

static std::map<string, Kernel>& kernels() {  // by target and name
    static std::map<string, Kernel> loaded;
    return loaded;
}

uint32_t Session::below(uint32_t count) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<uint32_t>(random >> 16) % count;
}

void Session::error(const string& text) {
    if (errors.size() < kShownErrors) errors.push_back(text);
    ++error_count;
}

void load_module(const string& text) {
    for (Kernel& kernel : parse(text)) kernels()[kernel.target + " " + kernel.name] = std::move(kernel);
}

int launch(const string& name, uint32_t blocks, uint32_t threads, size_t dynamic_shared, bool may_have_all_shared,
           void** arguments) {
    const auto found = kernels().find(session().options.target + " " + name);
    if (found == kernels().end()) throw std::runtime_error("no PTX of " + session().options.target + " " + name);
    const Kernel& kernel = found->second;
    session().launches.push_back(name);
    if (blocks == 0 || blocks > 0x7fffffffu || threads == 0 || threads % 32 ||
        threads > static_cast<uint32_t>(kernel.most_threads))
        return kInvalidConfiguration;
    const size_t shared = kernel.static_shared + dynamic_shared;
    if (shared > static_cast<size_t>(may_have_all_shared ? session().options.shared_limit : 48 * 1024))
        return kInvalidValue;
    vector<uint8_t> params(static_cast<size_t>(kernel.param_bytes));
    for (size_t n = 0; n < kernel.params.size(); ++n)
        memcpy(&params[kernel.params[n].first], arguments[n], kernel.params[n].second);
    for (uint32_t n = 0; n < blocks && session().error_count < kMostErrors; ++n) {
        const uint32_t number = session().options.backwards ? blocks - 1 - n : n;
        Block(kernel, params.data(), number, blocks, threads, shared).run();
    }
    return kSuccess;
}

}  // namespace ptx

extern "C" {

// Empty, or why the module cannot be run.
const char* ptx_load(const char* module) {
    static std::string error;
    try {
        ptx::load_module(module);
        error.clear();
    } catch (const std::exception& e) {
        error = e.what();
    }
    return error.c_str();
}

void ptx_begin(const char* target, int order, int copies, int wgmma, int lanes, int backwards, uint64_t seed,
               int shared_limit) {
    ptx::session() = {};
    ptx::session().options = {target, order, copies, wgmma, lanes, backwards, shared_limit};
    ptx::session().random = 88172645463325252ull ^ seed * 0x9E3779B97F4A7C15ull;
}

void ptx_region(uint64_t begin, uint64_t bytes, int may_read, int may_write, const char* name) {
    ptx::session().regions.push_back(
        {begin, begin + bytes, may_read != 0, may_write != 0, name, ptx::vector<uint8_t>(may_write ? bytes : 0)});
}

int ptx_launch(const char* kernel, uint32_t blocks, uint32_t threads, uint64_t shared_bytes, void** arguments) {
    return ptx::launch(kernel, blocks, threads, shared_bytes, true, arguments);
}

// The first errors, one a line; empty if there were none.
const char* ptx_errors() {
    static std::string text;
    const ptx::Session& session = ptx::session();
    text.clear();
    for (const std::string& error : session.errors) text += error + "\n";
    if (session.error_count) text += std::to_string(session.error_count) + " errors\n";
    for (const ptx::Region& region : session.regions)
        if (const uint64_t bytes = region.unwritten())
            text += std::to_string(bytes) + " bytes of " + region.name + " were not written\n";
    return text.c_str();
}

// Names of the kernels launched, one a line.
const char* ptx_launches() {
    static std::string text;
    text.clear();
    for (const std::string& name : ptx::session().launches) text += name + "\n";
    return text.c_str();
}
}
