/* Coefficients to pixels: the inverse DCT, chroma upsampling and colour conversion of libjpeg-turbo's defaults, with AVX2.
 *
 * Entry points: inverse_dct() makes the samples of two blocks; upsampled() doubles chroma samples; write_pixels() converts
 * 32 pixels from YCbCr to RGB. The algorithms are libjpeg-turbo's: the accurate integer inverse DCT (jidctint), "fancy"
 * upsampling (jdsample), and JFIF's YCbCr to RGB (jdcolor), with the same 16- and 32-bit steps. So the bytes are the same;
 * tests/loader_service/data/test_codecs.py compares them.
 *
 * Memory safety: all functions read and write whole vectors. inverse_dct() writes 8 rows of 8 bytes per block; upsampled()
 * reads from near - 1 to near + 16, and likewise at `far`; write_pixels() writes 32 * item bytes. The caller provides planes
 * with margins, and a buffer for the last pixels of a row. */

#ifndef LOADER_SERVICE_PIXELS_H
#define LOADER_SERVICE_PIXELS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { STEP_PX = 32 };       /* pixels that one call of write_pixels() makes */

/* ---- the inverse DCT, of two blocks at once: one in each 128-bit half of a vector ---- */

#define PAIR(a, b) _mm256_set1_epi32((int)((uint32_t)(uint16_t)(a) | (uint32_t)(uint16_t)(b) << 16))

/* Constants of the algorithm of Loeffler, Ligtenberg and Moschytz (1989), times 2 ** 13. */
enum {
    F_0_298 = 2446, F_0_390 = 3196, F_0_541 = 4433, F_0_765 = 6270, F_0_899 = 7373, F_1_175 = 9633,
    F_1_501 = 12299, F_1_847 = 15137, F_1_961 = 16069, F_2_053 = 16819, F_2_562 = 20995, F_3_072 = 25172,
};

/* One dimension of four of the eight columns: 32-bit sums of products of interleaved 16-bit items. */
TARGET_JPEG ALWAYS_INLINE void half_pass(__m256i out[8], __m256i sum04, __m256i difference04, __m256i v26, __m256i v71,
                                         __m256i v53, __m256i sums, int descale)
{
    const __m256i round = _mm256_set1_epi32(1 << (descale - 1));
    const __m256i a0 = _mm256_add_epi32(_mm256_srai_epi32(sum04, 3), round);
    const __m256i a1 = _mm256_add_epi32(_mm256_srai_epi32(difference04, 3), round);
    const __m256i a2 = _mm256_madd_epi16(v26, PAIR(F_0_541, F_0_541 - F_1_847));
    const __m256i a3 = _mm256_madd_epi16(v26, PAIR(F_0_541 + F_0_765, F_0_541));
    const __m256i z3 = _mm256_madd_epi16(sums, PAIR(F_1_175 - F_1_961, F_1_175));
    const __m256i z4 = _mm256_madd_epi16(sums, PAIR(F_1_175, F_1_175 - F_0_390));
    const __m256i odd[4] = {
        _mm256_add_epi32(_mm256_madd_epi16(v71, PAIR(-F_0_899, F_1_501 - F_0_899)), z4),
        _mm256_add_epi32(_mm256_madd_epi16(v53, PAIR(-F_2_562, F_3_072 - F_2_562)), z3),
        _mm256_add_epi32(_mm256_madd_epi16(v53, PAIR(F_2_053 - F_2_562, -F_2_562)), z4),
        _mm256_add_epi32(_mm256_madd_epi16(v71, PAIR(F_0_298 - F_0_899, -F_0_899)), z3),
    };
    const __m256i even[4] = {_mm256_add_epi32(a0, a3), _mm256_add_epi32(a1, a2), _mm256_sub_epi32(a1, a2),
                             _mm256_sub_epi32(a0, a3)};
    for (int i = 0; i < 4; i++) {
        out[i] = _mm256_srai_epi32(_mm256_add_epi32(even[i], odd[i]), descale);
        out[7 - i] = _mm256_srai_epi32(_mm256_sub_epi32(even[i], odd[i]), descale);
    }
}

/* One dimension of the transform; v[i] holds item i of the eight columns. */
TARGET_JPEG ALWAYS_INLINE void pass(__m256i v[8], int descale)
{
    const __m256i zero = _mm256_setzero_si256();
    const __m256i sum04 = _mm256_add_epi16(v[0], v[4]), difference04 = _mm256_sub_epi16(v[0], v[4]);
    const __m256i sum73 = _mm256_add_epi16(v[7], v[3]), sum51 = _mm256_add_epi16(v[5], v[1]);
    __m256i low[8], high[8];
    half_pass(low, _mm256_unpacklo_epi16(zero, sum04), _mm256_unpacklo_epi16(zero, difference04),
              _mm256_unpacklo_epi16(v[2], v[6]), _mm256_unpacklo_epi16(v[7], v[1]), _mm256_unpacklo_epi16(v[5], v[3]),
              _mm256_unpacklo_epi16(sum73, sum51), descale);
    half_pass(high, _mm256_unpackhi_epi16(zero, sum04), _mm256_unpackhi_epi16(zero, difference04),
              _mm256_unpackhi_epi16(v[2], v[6]), _mm256_unpackhi_epi16(v[7], v[1]), _mm256_unpackhi_epi16(v[5], v[3]),
              _mm256_unpackhi_epi16(sum73, sum51), descale);
    for (int i = 0; i < 8; i++)
        v[i] = _mm256_packs_epi32(low[i], high[i]);
}

TARGET_JPEG ALWAYS_INLINE void transpose(__m256i v[8])
{
    __m256i a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi16(v[i], v[i + 4]);
        a[2 * i + 1] = _mm256_unpackhi_epi16(v[i], v[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_epi16(a[i], a[i + 4]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 4]);
    }
    for (int i = 0; i < 4; i++) {
        v[2 * i] = _mm256_unpacklo_epi16(b[i], b[i + 4]);
        v[2 * i + 1] = _mm256_unpackhi_epi16(b[i], b[i + 4]);
    }
}

TARGET_JPEG ALWAYS_INLINE __m256i both(const int16_t *a, const int16_t *b)
{
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a)),
                                   _mm_loadu_si128((const __m128i *)b), 1);
}

TARGET_JPEG ALWAYS_INLINE void store_rows(uint8_t *out, ptrdiff_t stride, __m128i rows)
{
    _mm_storel_epi64((__m128i *)out, rows);
    _mm_storel_epi64((__m128i *)(out + stride), _mm_unpackhi_epi64(rows, rows));
}

/* Transform two blocks of 64 coefficients, with their quantisation tables, to 8 x 8 samples each. Returns 0 if a coefficient
 * of the first row is eight times what any pixels give: if it is alone in its column, libjpeg-turbo takes a shortcut whose
 * 16 bits overflow, and the bytes would differ. */
TARGET_JPEG static int inverse_dct(const int16_t *block, const int16_t *block2, const int16_t *table, const int16_t *table2,
                                    uint8_t *out, uint8_t *out2, ptrdiff_t stride)
{
    __m256i v[8];
    for (int i = 0; i < 8; i++)
        v[i] = _mm256_mullo_epi16(both(block + 8 * i, block2 + 8 * i), both(table + 8 * i, table2 + 8 * i));
    if (!_mm256_testz_si256(_mm256_add_epi16(v[0], _mm256_set1_epi16(8192)), _mm256_set1_epi16((int16_t)0xC000)))
        return 0;
    pass(v, 11); /* columns; keeps 2 fraction bits, as jidctint's PASS1_BITS */
    transpose(v);
    pass(v, 18); /* rows; removes them, and the DCT's factor of 8 */
    /* v[i] is now column i. Pack to bytes and transpose back, to two rows in each half of rows[i]. */
    __m256i quarters[4], rows[4];
    for (int i = 0; i < 2; i++) {
        const __m256i even = _mm256_packs_epi16(v[4 * i], v[4 * i + 2]), odd = _mm256_packs_epi16(v[4 * i + 1], v[4 * i + 3]);
        const __m256i first = _mm256_unpacklo_epi8(even, odd), second = _mm256_unpackhi_epi8(even, odd);
        quarters[i] = _mm256_unpacklo_epi16(first, second);
        quarters[i + 2] = _mm256_unpackhi_epi16(first, second);
    }
    for (int i = 0; i < 2; i++) {
        rows[2 * i] = _mm256_unpacklo_epi32(quarters[2 * i], quarters[2 * i + 1]);
        rows[2 * i + 1] = _mm256_unpackhi_epi32(quarters[2 * i], quarters[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i row = _mm256_xor_si256(rows[i], _mm256_set1_epi8(-128)); /* adds 128, JPEG's level shift */
        store_rows(out + 2 * i * stride, stride, _mm256_castsi256_si128(row));
        store_rows(out2 + 2 * i * stride, stride, _mm256_extracti128_si256(row, 1));
    }
    return 1;
}

/* ---- colours ---- */

/* Load 16 samples as 16-bit items. */
TARGET_JPEG ALWAYS_INLINE __m256i widened(const uint8_t *at)
{
    return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)at));
}

/* 3 * near + 1 * far: the vertical step of h2v2 fancy upsampling, times four. */
TARGET_JPEG ALWAYS_INLINE __m256i row_sum(const uint8_t *near, const uint8_t *far)
{
    const __m256i n = widened(near);
    return _mm256_add_epi16(_mm256_add_epi16(n, _mm256_add_epi16(n, n)), widened(far));
}

/* Upsample 16 chroma samples at `near` to 32 pixels. With half as many rows, `far` is the same place in the nearer
 * neighbour row; else NULL. Of each two pixels, the left one is 3/4 its sample plus 1/4 the sample to the left, the right
 * one 3/4 plus 1/4 the sample to the right. The rounding constants (8 and 7, 1 and 2) are libjpeg's ordered dither. */
TARGET_JPEG ALWAYS_INLINE __m256i upsampled(const uint8_t *near, const uint8_t *far)
{
    __m256i here, left, right, even, odd;
    if (far != NULL) {
        here = row_sum(near, far), left = row_sum(near - 1, far - 1), right = row_sum(near + 1, far + 1);
    } else {
        here = widened(near), left = widened(near - 1), right = widened(near + 1);
    }
    const __m256i thrice = _mm256_add_epi16(here, _mm256_add_epi16(here, here));
    even = _mm256_add_epi16(thrice, left), odd = _mm256_add_epi16(thrice, right);
    if (far != NULL) {
        even = _mm256_srli_epi16(_mm256_add_epi16(even, _mm256_set1_epi16(8)), 4);
        odd = _mm256_srli_epi16(_mm256_add_epi16(odd, _mm256_set1_epi16(7)), 4);
    } else {
        even = _mm256_srli_epi16(_mm256_add_epi16(even, _mm256_set1_epi16(1)), 2);
        odd = _mm256_srli_epi16(_mm256_add_epi16(odd, _mm256_set1_epi16(2)), 2);
    }
    return _mm256_or_si256(even, _mm256_slli_epi16(odd, 8));
}

/* x * factor / 2 ** 16 with libjpeg-turbo's rounding, in 16 bits: (2 x * factor / 2 ** 16 + 1) / 2. */
TARGET_JPEG ALWAYS_INLINE __m256i fraction(__m256i twice, int factor)
{
    const __m256i product = _mm256_mulhi_epi16(twice, _mm256_set1_epi16((int16_t)factor));
    return _mm256_srai_epi16(_mm256_add_epi16(product, _mm256_set1_epi16(1)), 1);
}

/* Convert 16 pixels to red, green and blue as 16-bit items, not yet clipped. */
TARGET_JPEG ALWAYS_INLINE void colours(__m256i rgb[3], __m256i y, __m256i cb, __m256i cr)
{
    const __m256i half = _mm256_set1_epi32(1 << 15), weights = PAIR(-22554, 18734); /* -.34414 and 1 - .71414 */
    cb = _mm256_sub_epi16(cb, _mm256_set1_epi16(128));
    cr = _mm256_sub_epi16(cr, _mm256_set1_epi16(128));
    const __m256i cb2 = _mm256_add_epi16(cb, cb), cr2 = _mm256_add_epi16(cr, cr);
    const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi16(cb, cr), weights);
    const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi16(cb, cr), weights);
    const __m256i green = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_add_epi32(low, half), 16),
                                             _mm256_srai_epi32(_mm256_add_epi32(high, half), 16));
    rgb[0] = _mm256_add_epi16(y, _mm256_add_epi16(cr, fraction(cr2, 26345)));    /* 1.40200 - 1 */
    rgb[1] = _mm256_add_epi16(y, _mm256_sub_epi16(green, cr));
    rgb[2] = _mm256_add_epi16(y, _mm256_add_epi16(cb2, fraction(cb2, -14942))); /* 1.77200 - 2 */
}

/* Shuffle of channel c into third k of 16 interleaved RGB pixels; 0x80 writes 0. */
static uint8_t PLACES_RGB[3][3][16];

static void make_places_rgb(void)
{
    for (int j = 0; j < 48; j++)
        for (int c = 0; c < 3; c++)
            PLACES_RGB[j / 16][c][j % 16] = (uint8_t)(j % 3 == c ? j / 3 : 0x80);
}

/* Write 32 pixels as red, green, blue, 255. */
TARGET_JPEG ALWAYS_INLINE void write_fours(uint8_t *out, const __m256i rgb[3])
{
    const __m256i full = _mm256_set1_epi8(-1);
    const __m256i rg[2] = {_mm256_unpacklo_epi8(rgb[0], rgb[1]), _mm256_unpackhi_epi8(rgb[0], rgb[1])};
    const __m256i bx[2] = {_mm256_unpacklo_epi8(rgb[2], full), _mm256_unpackhi_epi8(rgb[2], full)};
    __m256i fours[4];
    for (int i = 0; i < 2; i++) {
        fours[2 * i] = _mm256_unpacklo_epi16(rg[i], bx[i]);
        fours[2 * i + 1] = _mm256_unpackhi_epi16(rg[i], bx[i]);
    }
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(out + 16 * i), _mm256_castsi256_si128(fours[i]));
        _mm_storeu_si128((__m128i *)(out + 64 + 16 * i), _mm256_extracti128_si256(fours[i], 1));
    }
}

/* Convert 32 pixels and write them with `item` bytes each: 3, or 4 with 255 as the last. */
TARGET_JPEG ALWAYS_INLINE void write_pixels(uint8_t *out, int item, __m256i y, __m256i cb, __m256i cr)
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i low[3], high[3], thirds[3];
    colours(low, _mm256_unpacklo_epi8(y, zero), _mm256_unpacklo_epi8(cb, zero), _mm256_unpacklo_epi8(cr, zero));
    colours(high, _mm256_unpackhi_epi8(y, zero), _mm256_unpackhi_epi8(cb, zero), _mm256_unpackhi_epi8(cr, zero));
    for (int c = 0; c < 3; c++)
        low[c] = _mm256_packus_epi16(low[c], high[c]);
    if (item == 4) {
        write_fours(out, low);
        return;
    }
    for (int k = 0; k < 3; k++) {
        thirds[k] = zero;
        for (int c = 0; c < 3; c++) {
            const __m256i places = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)PLACES_RGB[k][c]));
            thirds[k] = _mm256_or_si256(thirds[k], _mm256_shuffle_epi8(low[c], places));
        }
    }
    _mm256_storeu_si256((__m256i *)out, _mm256_permute2x128_si256(thirds[0], thirds[1], 0x20));
    _mm256_storeu_si256((__m256i *)(out + 32), _mm256_permute2x128_si256(thirds[2], thirds[0], 0x30));
    _mm256_storeu_si256((__m256i *)(out + 64), _mm256_permute2x128_si256(thirds[1], thirds[2], 0x31));
}

#endif
