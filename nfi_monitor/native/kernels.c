/* Compile the loops of kernels.h for several instruction sets, and choose one that this processor has. */
#include "nfi.h"

#include <math.h>
#include <string.h>

#define BLOCK 256 /* elements that a loop keeps in the first cache */

#define NAME(x) x##_plain
#include "kernels.h"
#undef NAME

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__) && !defined(NFI_PLAIN)
#define NFI_SEVERAL 1
#endif

#ifdef NFI_SEVERAL

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define NAME(x) x##_avx2
#include "kernels.h"
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                               \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define NAME(x) x##_avx512
#include "kernels.h"
#undef NAME
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

static const nfi_kernels *of_level(int level)
{
#ifdef NFI_SEVERAL
    __builtin_cpu_init();
    if (level == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                   ? &kernels_avx512
                   : NULL;
    if (level == 1)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels_avx2 : NULL;
#endif
    return level == 0 ? &kernels_plain : NULL;
}

const nfi_kernels *nfi_in_use = &kernels_plain;

NFI_PUBLIC int nfi_version(void) { return NFI_VERSION; }

/* Use the kernels of a level: 0 any processor, 1 AVX2, 2 AVX-512, -1 the highest that runs here. Returns the
 * level in use, or -1 (and changes nothing) where this processor or this build does not have it. */
NFI_PUBLIC int nfi_select(int level)
{
    int first = level < 0 ? 2 : level, last = level < 0 ? 0 : level;
    for (int at = first; at >= last; at--) {
        const nfi_kernels *found = of_level(at);
        if (found) {
            nfi_in_use = found;
            return at;
        }
    }
    return -1;
}
