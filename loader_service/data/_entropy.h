/* Huffman-coded blocks of baseline JPEG (ITU T.81, annex F). A look-up gives up to two coefficients at once: how many zeros
 * stand before each, its value, and how many bits both take. */

#ifndef LOADER_SERVICE_ENTROPY_H
#define LOADER_SERVICE_ENTROPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    LOOK_BITS = 11,          /* of a look-up: a table is 16 KB. Measured: 11 to 13 are alike */
    BLOCK_ITEMS = 64,
    END_OF_BLOCK = 128,      /* a run that leads out of any block */
    NO_COEFFICIENT = 255,    /* a run that stands for none: as a step, 255 + 1 is 0 in eight bits */
    SPARE_BYTES = 2048,      /* more than the six blocks of a unit can take: 6 * 64 symbols of 27 bits */
};

/* Where coefficients stand in a block; those that lead out of it are dropped into its 65th item. */
static uint8_t PLACES[BLOCK_ITEMS + 2 * END_OF_BLOCK + NO_COEFFICIENT];

static const uint8_t ZIGZAG[BLOCK_ITEMS] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
    12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
    35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
    58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
};

static void make_places(void)
{
    memset(PLACES, BLOCK_ITEMS, sizeof PLACES);
    memcpy(PLACES, ZIGZAG, sizeof ZIGZAG);
}

/* ---- bits ---- */

typedef struct {
    uint64_t word;           /* the next bits, the first one on top */
    const uint8_t *next;     /* the first byte that is not wholly in it */
    unsigned left;           /* how many bits of it count */
} Bits;

/* At least 56 bits are there afterwards; eight bytes are read at `next`. */
ALWAYS_INLINE void refill(Bits *b)
{
    uint64_t bytes;
    memcpy(&bytes, b->next, sizeof bytes);
    b->word |= __builtin_bswap64(bytes) >> b->left;
    b->next += (63 - b->left) >> 3;
    b->left |= 56;
}

ALWAYS_INLINE void drop(Bits *b, unsigned n)
{
    b->word <<= n;
    b->left -= n;
}

/* ---- tables ---- */

/* One word, which stays in a register, from the lowest byte: bits of both coefficients, bits of the first one, run before
 * the first one, run before the second one; then two bytes for each value. No bits: longer than a look-up; then the second
 * byte has the bits of its code, and the third one its symbol, or both are 0 where the code alone is longer. */
typedef uint64_t Entry;

ALWAYS_INLINE unsigned byte_of(Entry e, int i) { return (uint8_t)(e >> 8 * i); }
ALWAYS_INLINE int16_t value_of(Entry e, int i) { return (int16_t)(e >> (32 + 16 * i)); }

ALWAYS_INLINE Entry entry(unsigned bits, unsigned bits_first, unsigned run, unsigned run2, int value, int value2)
{
    return bits | bits_first << 8 | run << 16 | (Entry)run2 << 24 | (Entry)(uint16_t)value << 32 |
           (Entry)(uint16_t)value2 << 48;
}

typedef struct {
    uint8_t counts[16], symbols[256]; /* as in the file: by these a table is known again */
    int n;                   /* symbols; 0: there is no table */
    int is_ac;
    uint32_t ends[17];       /* by length: the first code that is longer, as 16 bits */
    int firsts[17];          /* by length: index of a symbol minus its code */
    Entry entries[1 << LOOK_BITS];
} Huffman;

/* What a symbol and the bits after it stand for. */
ALWAYS_INLINE Entry single(const Huffman *h, unsigned symbol, unsigned length, unsigned bits)
{
    const unsigned size = symbol & 15, run = !h->is_ac ? 0 : symbol == 0 ? END_OF_BLOCK : symbol >> 4;
    const int value = size > 0 && bits < 1u << (size - 1) ? (int)bits - (1 << size) + 1 : (int)bits;
    return entry(length + size, length + size, run, NO_COEFFICIENT, value, 0);
}

/* Whether baseline JPEG of 8 bits knows a symbol. */
static int is_symbol(unsigned symbol, int is_ac)
{
    const unsigned size = symbol & 15;
    return !is_ac ? symbol <= 11 : size > 0 ? size <= 10 : symbol == 0x00 || symbol == 0xF0;
}

/* All look-ups that begin with one code. */
static void add_singles(Huffman *h, unsigned symbol, unsigned length, uint32_t code)
{
    const unsigned size = symbol & 15;
    if (length > LOOK_BITS)
        return;
    Entry *entries = h->entries + (code >> (16 - LOOK_BITS));
    for (unsigned i = 0, n = 1u << (LOOK_BITS - length); i < n; i++)
        entries[i] = length + size > LOOK_BITS ? entry(0, length, symbol, 0, 0, 0)
                                               : single(h, symbol, length, i >> (LOOK_BITS - length - size));
}

/* To each look-up the coefficient that follows within its bits, if one does. */
static void add_seconds(Huffman *h)
{
    static Entry singles[1 << LOOK_BITS];
    memcpy(singles, h->entries, sizeof singles);
    for (unsigned i = 0; i < 1u << LOOK_BITS; i++) {
        const Entry e = singles[i];
        const unsigned bits = byte_of(e, 0);
        if (bits == 0 || byte_of(e, 2) == END_OF_BLOCK)
            continue;
        const Entry f = singles[i << bits & ((1u << LOOK_BITS) - 1)];
        if (byte_of(f, 0) > 0 && bits + byte_of(f, 0) <= LOOK_BITS)
            h->entries[i] =
                entry(bits + byte_of(f, 0), bits, byte_of(e, 2), byte_of(f, 2), value_of(e, 0), value_of(f, 0));
    }
}

/* Make a table of `n` symbols, unless it is the one that was made last; 0 if it is none that libjpeg would take. */
static int make_huffman(Huffman *h, const uint8_t counts[16], const uint8_t *symbols, int n, int is_ac)
{
    if (h->n == n && memcmp(h->counts, counts, 16) == 0 && memcmp(h->symbols, symbols, (size_t)n) == 0)
        return 1;
    h->n = 0;
    h->is_ac = is_ac;
    memset(h->entries, 0, sizeof h->entries);
    uint32_t code = 0; /* as 16 bits */
    for (unsigned length = 1, i = 0; length <= 16; length++) {
        const uint32_t step = 1u << (16 - length);
        h->firsts[length] = (int)i - (int)(code / step);
        for (unsigned end = i + counts[length - 1]; i < end; i++, code += step) {
            if (code + step > 0xFFFF || !is_symbol(symbols[i], is_ac)) /* a code of ones alone is none */
                return 0;
            add_singles(h, symbols[i], length, code);
        }
        h->ends[length] = code;
    }
    if (is_ac)
        add_seconds(h);
    memcpy(h->counts, counts, 16);
    memcpy(h->symbols, symbols, (size_t)n);
    h->n = n;
    return 1;
}

/* ---- blocks ---- */

/* What is longer than a look-up, which found `e`; no bits if there is no such code. */
static __attribute__((noinline)) Entry long_entry(const Huffman *h, uint64_t word, Entry e)
{
    unsigned length = byte_of(e, 1), symbol = byte_of(e, 2);
    if (length == 0) {
        const uint32_t code = (uint32_t)(word >> 48);
        for (length = LOOK_BITS + 1; length <= 16 && code >= h->ends[length]; length++)
            ;
        if (length > 16)
            return 0;
        symbol = h->symbols[h->firsts[length] + (int)(code >> (16 - length))];
    }
    const unsigned size = symbol & 15;
    return single(h, symbol, length, size > 0 ? (unsigned)(word << length >> (64 - size)) : 0);
}

ALWAYS_INLINE Entry next_entry(const Huffman *h, uint64_t word)
{
    const Entry e = h->entries[word >> (64 - LOOK_BITS)];
    return __builtin_expect(byte_of(e, 0) > 0, 1) ? e : long_entry(h, word, e);
}

/* One or two coefficients; the next one's number. The second one may belong to the next block, and is then left there. */
TARGET_JPEG ALWAYS_INLINE unsigned read_pair(Bits *b, const Huffman *ac, int16_t *block, unsigned k)
{
    const Entry e = next_entry(ac, b->word);
    if (__builtin_expect(byte_of(e, 0) == 0, 0))
        return END_OF_BLOCK;
    k += byte_of(e, 2);
    block[PLACES[k++]] = value_of(e, 0);
    if (k >= BLOCK_ITEMS) {
        drop(b, byte_of(e, 1));
        return k;
    }
    drop(b, byte_of(e, 0));
    block[PLACES[k + byte_of(e, 3)]] = value_of(e, 1);
    return k + (uint8_t)(byte_of(e, 3) + 1);
}

/* Read coefficients into a block of zeros, in natural order, with a 65th item. 0 if they are not as they should be; that
 * the bits have not ended before, the caller sees to. */
TARGET_JPEG static int read_block(Bits *bits, const Huffman *dc, const Huffman *ac, int16_t *block, int *last_dc)
{
    Bits b = *bits; /* in registers */
    refill(&b);
    const Entry e = next_entry(dc, b.word);
    drop(&b, byte_of(e, 0));
    *last_dc += value_of(e, 0);
    block[0] = (int16_t)*last_dc;
    unsigned k = 1;
    do { /* 56 bits are enough for a look-up that finds something, and 27 bits after it; for 27 bits twice, just so */
        refill(&b);
        k = read_pair(&b, ac, block, k);
        if (k >= BLOCK_ITEMS)
            break;
        k = read_pair(&b, ac, block, k);
    } while (k < BLOCK_ITEMS);
    *bits = b;
    return byte_of(e, 0) > 0 && (k == BLOCK_ITEMS || k > END_OF_BLOCK);
}

#endif
