/* One row of a sample in each kernel form: crop, mirror and colour shift in one pass.
 *
 * Entry points: row_c, row_avx2, row_avx512 and row_neon read the n bytes (n / 3 pixels) at `in` and write n bytes to `out`:
 *
 *     out[3 i + c] = clip(in[3 j + c] + shift[c], 0, 255)      j = i, or n / 3 - 1 - i if mirrored
 *
 * halves_c and halves_avx2 subtract the mean and convert to float16; stream_avx512 copies past the caches.
 *
 * Memory safety: a row function reads and writes exactly these bytes, because the neighbouring sample may belong to another
 * process, and the record may end at the end of mapped memory. Rows shorter than a vector step go to row_c. The vector
 * forms step by whole pixels, so that one shift pattern and one shuffle serve every step, and mirroring is as fast as
 * copying. The last step overlaps the one before it and writes the same bytes there.
 */

#ifndef LOADER_SERVICE_ROWS_H
#define LOADER_SERVICE_ROWS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* The vector instructions that this build may use. -DLOADER_SERVICE_PORTABLE leaves them all out: tests build that form on any
 * machine. */
#if defined(__x86_64__) && !defined(LOADER_SERVICE_PORTABLE)
#define VECTORS_X86 1
#elif defined(__aarch64__) && !defined(LOADER_SERVICE_PORTABLE)
#define VECTORS_ARM 1
#endif

/* A colour shift as two saturating steps, add `up` and subtract `down`; one of them is 0 in each channel. Repeated to fill
 * vectors of pixels. */
typedef struct {
    uint8_t up[64], down[64];
} Shift;

ALWAYS_INLINE void spread(Shift *shift, const int16_t channels[3])
{
    for (int i = 0; i < 64; i++) {
        int by = channels[i % 3];
        shift->up[i] = (uint8_t)(by > 0 ? by : 0);
        shift->down[i] = (uint8_t)(by < 0 ? -by : 0);
    }
}

ALWAYS_INLINE void row_c(uint8_t *out, const uint8_t *in, ptrdiff_t n, int mirrored, const Shift *shift)
{
    ptrdiff_t step = mirrored ? -3 : 3;
    if (mirrored)
        in += n - 3;
    for (; n > 0; n -= 3, in += step, out += 3)
        for (int c = 0; c < 3; c++) {
            int v = in[c] + shift->up[c] - shift->down[c];
            out[c] = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
        }
}

/* Convert to the nearest float16, ties to even, bit for bit as NumPy and F16C do. */
ALWAYS_INLINE uint16_t to_half(float value)
{
    uint32_t bits, rest;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t size = bits & 0x7fffffff;
    float small;
    memcpy(&small, &size, sizeof small);
    small += 0.5f; /* the last bit of 0.5f is 2^-24, the smallest float16: this addition rounds to it */
    memcpy(&rest, &small, sizeof rest);
    const uint32_t subnormal = rest - 0x3f000000;
    const uint32_t normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    uint32_t half = size < 0x38800000 ? subnormal : normal; /* 2^-14 */
    half = size < 0x47800000 ? half : 0x7c00;               /* from 2^16 on: infinite */
    half = size > 0x7f800000 ? 0x7e00 : half;               /* NaN */
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)half;
}

/* Write n pixel values minus the mean's as float16. */
ALWAYS_INLINE void halves_c(uint16_t *out, const uint8_t *pixels, const float *mean, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = to_half((float)pixels[i] - mean[i]);
}

#if defined(VECTORS_X86)
#include <cpuid.h>
#include <immintrin.h>

#define TARGET_AVX2 __attribute__((target("avx2,f16c")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi,avx2,f16c")))

/* By cpuid, because not all compilers know __builtin_cpu_supports("f16c"). */
static inline int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}

TARGET_AVX2 static inline void halves_avx2(uint16_t *out, const uint8_t *pixels, const float *mean, ptrdiff_t n)
{
    enum { STEP = 8 };
    ptrdiff_t i = 0;
    for (; i + STEP <= n; i += STEP) {
        __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(pixels + i))));
        v = _mm256_sub_ps(v, _mm256_loadu_ps(mean + i));
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    halves_c(out + i, pixels + i, mean + i, n - i);
}

/* Ten pixels a step, five in each half of a vector, because byte shuffles do not cross the halves. The halves are loaded at
 * bytes 0 and 14 and overlap by two, so that no byte outside of the 30 is read; each has one byte that is not used. */
TARGET_AVX2 static inline void row_avx2(uint8_t *out, const uint8_t *in, ptrdiff_t n, int mirrored, const Shift *shift)
{
    enum { STEP = 30 };
    if (n < STEP) {
        row_c(out, in, n, mirrored, shift);
        return;
    }
    const __m256i keep = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, -1,
                                          1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, -1);
    const __m256i reverse = _mm256_setr_epi8(13, 14, 15, 10, 11, 12, 7, 8, 9, 4, 5, 6, 1, 2, 3, -1,
                                             12, 13, 14, 9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2, -1);
    const __m256i order = mirrored ? reverse : keep;
    const __m128i up = _mm_loadu_si128((const __m128i *)shift->up);
    const __m128i down = _mm_loadu_si128((const __m128i *)shift->down);
    const __m256i ups = _mm256_broadcastsi128_si256(up), downs = _mm256_broadcastsi128_si256(down);
    const ptrdiff_t first = mirrored ? 14 : 0, second = 14 - first;
    for (ptrdiff_t done = 0; done < n; done += STEP) {
        if (done > n - STEP)
            done = n - STEP;
        const uint8_t *from = mirrored ? in + n - STEP - done : in + done;
        __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(from + first)));
        v = _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i *)(from + second)), 1);
        v = _mm256_shuffle_epi8(v, order);
        v = _mm256_subs_epu8(_mm256_adds_epu8(v, ups), downs);
        __m128i high = _mm256_extracti128_si256(v, 1);
        /* Stores of 16, 8 and 8 bytes for 15 and 15: each store overwrites the wrong last byte of the one before it. */
        _mm_storeu_si128((__m128i *)(out + done), _mm256_castsi256_si128(v));
        _mm_storel_epi64((__m128i *)(out + done + 15), high);
        _mm_storel_epi64((__m128i *)(out + done + 22), _mm_srli_si128(high, 7));
    }
}

/* Twenty-one pixels a step: one byte permutation across the whole vector. */
TARGET_AVX512 static inline void row_avx512(uint8_t *out, const uint8_t *in, ptrdiff_t n, int mirrored,
                                            const Shift *shift)
{
    enum { STEP = 63 };
    if (n < STEP) {
        row_c(out, in, n, mirrored, shift);
        return;
    }
    uint8_t places[64];
    for (int i = 0; i < 64; i++)
        places[i] = (uint8_t)(mirrored ? 60 - i / 3 * 3 + i % 3 : i);
    const __mmask64 whole = UINT64_MAX >> (64 - STEP);
    const __m512i order = _mm512_loadu_si512(places);
    const __m512i up = _mm512_loadu_si512(shift->up), down = _mm512_loadu_si512(shift->down);
    for (ptrdiff_t done = 0; done < n; done += STEP) {
        if (done > n - STEP)
            done = n - STEP;
        const uint8_t *from = mirrored ? in + n - STEP - done : in + done;
        __m512i v = _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(whole, from));
        v = _mm512_subs_epu8(_mm512_adds_epu8(v, up), down);
        _mm512_mask_storeu_epi8(out + done, whole, v);
    }
}

/* Copy n bytes to whole cache lines with non-temporal stores. Other cores may not see them before finish_streams(). */
TARGET_AVX512 static inline void stream_avx512(uint8_t *out, const uint8_t *in, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += 64)
        _mm512_stream_si512((void *)(out + i), _mm512_loadu_si512(in + i));
}

static inline void finish_streams(void) { _mm_sfence(); }

#elif defined(VECTORS_ARM)
#include <arm_neon.h>

/* Sixteen pixels a step, one vector per channel. */
static inline void row_neon(uint8_t *out, const uint8_t *in, ptrdiff_t n, int mirrored, const Shift *shift)
{
    enum { STEP = 48 };
    if (n < STEP) {
        row_c(out, in, n, mirrored, shift);
        return;
    }
    for (ptrdiff_t done = 0; done < n; done += STEP) {
        if (done > n - STEP)
            done = n - STEP;
        uint8x16x3_t v = vld3q_u8(mirrored ? in + n - STEP - done : in + done);
        for (int c = 0; c < 3; c++) {
            if (mirrored) {
                v.val[c] = vrev64q_u8(v.val[c]);
                v.val[c] = vextq_u8(v.val[c], v.val[c], 8);
            }
            v.val[c] = vqsubq_u8(vqaddq_u8(v.val[c], vdupq_n_u8(shift->up[c])), vdupq_n_u8(shift->down[c]));
        }
        vst3q_u8(out + done, v);
    }
}
#endif

#if !defined(VECTORS_X86)
static inline void finish_streams(void) {}
#endif

#endif
