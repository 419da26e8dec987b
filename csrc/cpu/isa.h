// The instruction set a kernel file is being compiled for.
//
// Every csrc/<op>.cpp is compiled once per set with -DTWOSTEP_ISA=portable|avx2|avx512, and all that it defines or
// includes from this folder lives in the namespace twostep::cpu::TWOSTEP_ISA. That is what keeps the linker from
// merging an inline function built for AVX-512 into the code that runs on an older processor; for the same reason
// these files use no standard-library templates.
#pragma once

#ifndef TWOSTEP_ISA
#define TWOSTEP_ISA portable
#endif

#define TWOSTEP_VECTOR_BYTES_portable 16
#define TWOSTEP_VECTOR_BYTES_avx2 32
#define TWOSTEP_VECTOR_BYTES_avx512 64
#define TWOSTEP_JOIN_EXPANDED(a, b) a##b
#define TWOSTEP_JOIN(a, b) TWOSTEP_JOIN_EXPANDED(a, b)
#define TWOSTEP_VECTOR_BYTES TWOSTEP_JOIN(TWOSTEP_VECTOR_BYTES_, TWOSTEP_ISA)

#define TWOSTEP_AVX512 (TWOSTEP_VECTOR_BYTES == 64)
#define TWOSTEP_AVX2 (TWOSTEP_VECTOR_BYTES >= 32)

#if defined(__SSE2__)
#if !defined(__clang__)  // GCC 12 takes its own _mm512_undefined_ps for a mistake of ours
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#define TWOSTEP_X86 1
#else
#define TWOSTEP_X86 0
#endif

// The vector code counts on being inlined whole: accumulators must stay in registers.
#define TWOSTEP_INLINE inline __attribute__((always_inline))
#define TWOSTEP_LAMBDA __attribute__((always_inline))
