/* Entropy decoding of baseline JPEG (ITU T.81, annex F): Huffman-coded bits to blocks of 64 coefficients.
 *
 * Entry points: make_huffman() builds a table from a DHT segment; read_block() reads one block. A table look-up of LOOK_BITS
 * bits gives up to two coefficients at once: the zeros before each, their values, and the bits that both take.
 *
 * Memory safety: read_block() does not check for the end of the input. The caller appends SPARE_BYTES zeros to the coded
 * bytes, more than one unit can consume, and compares the position with the end after each unit. Every write to a block
 * goes through PLACES, which maps each index that damaged codes can reach to one of the block's 65 items. Symbols are
 * checked when a table is made, so that no value has more than 11 bits. */

#ifndef LOADER_SERVICE_ENTROPY_H
#define LOADER_SERVICE_ENTROPY_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum {
    LOOK_BITS = 11,          /* bits of a look-up: a table is 16 KB. Measured: 11 to 13 are equally fast */
    BLOCK_ITEMS = 64,
    END_OF_BLOCK = 128,      /* as a run: leads out of any block */
    NO_COEFFICIENT = 255,    /* as a run: no second coefficient. As a step, 255 + 1 wraps to 0 in eight bits */
    SPARE_BYTES = 2048,      /* more than the six blocks of a unit can take: 6 * 64 symbols of 27 bits are 1,296 bytes */
};

/* Place of each coefficient in a block. Indices beyond the block map to its 65th item, which is never used. The array covers
 * every index that a k below 64 plus the runs of one entry can reach. */
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
    const uint8_t *next;     /* the first byte that is not completely in `word` */
    unsigned left;           /* number of valid bits in `word` */
} Bits;

/* Fill up to at least 56 valid bits. Reads eight bytes at `next`, whatever is left: see SPARE_BYTES. */
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

/* A table entry in one word, which stays in a register. From the lowest byte: bits of both coefficients, bits of the first,
 * run before the first, run before the second; then two bytes for each value. If the first byte is 0, the coefficient needs
 * more bits than a look-up has: the second byte then has the bits of its code and the third its symbol, or both are 0 if
 * the code alone is longer. */
typedef uint64_t Entry;

ALWAYS_INLINE unsigned byte_of(Entry e, int i) { return (uint8_t)(e >> 8 * i); }
ALWAYS_INLINE int16_t value_of(Entry e, int i) { return (int16_t)(e >> (32 + 16 * i)); }

ALWAYS_INLINE Entry entry(unsigned bits, unsigned bits_first, unsigned run, unsigned run2, int value, int value2)
{
    return bits | bits_first << 8 | run << 16 | (Entry)run2 << 24 | (Entry)(uint16_t)value << 32 |
           (Entry)(uint16_t)value2 << 48;
}

typedef struct {
    uint8_t counts[16], symbols[256]; /* as in the file: an equal table is not built again */
    int n;                   /* number of symbols; 0: no table */
    int is_ac;
    uint32_t ends[17];       /* by length: the first longer code, left-aligned in 16 bits */
    int firsts[17];          /* by length: index of a symbol minus its code */
    Entry entries[1 << LOOK_BITS];
} Huffman;

/* The entry of one coefficient: its symbol and the value bits after it. */
ALWAYS_INLINE Entry single(const Huffman *h, unsigned symbol, unsigned length, unsigned bits)
{
    const unsigned size = symbol & 15, run = !h->is_ac ? 0 : symbol == 0 ? END_OF_BLOCK : symbol >> 4;
    const int value = size > 0 && bits < 1u << (size - 1) ? (int)bits - (1 << size) + 1 : (int)bits;
    return entry(length + size, length + size, run, NO_COEFFICIENT, value, 0);
}

/* 1 if baseline JPEG of 8 bits has this symbol. */
static int is_symbol(unsigned symbol, int is_ac)
{
    const unsigned size = symbol & 15;
    return !is_ac ? symbol <= 11 : size > 0 ? size <= 10 : symbol == 0x00 || symbol == 0xF0;
}

/* Fill all entries whose look-up begins with one code. */
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

/* Add to each entry the second coefficient, if it fits completely into the look-up's remaining bits. */
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

/* Make a table of `n` symbols, unless `h` already is this table. Returns 0 if libjpeg would refuse it. */
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
            if (code + step > 0xFFFF || !is_symbol(symbols[i], is_ac)) /* T.81 reserves the code of all ones */
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

/* The entry of a coefficient that is longer than a look-up, whose entry is `e`; 0 if there is no such code. */
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

/* Read one or two coefficients; return the index of the next. A second one that belongs to the next block is not read. */
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

/* Read the coefficients of one block, in natural order, into `block`: 65 zeros, the last one for dropped coefficients.
 * Returns 0 if a code is unknown or leads out of the block. The caller checks that the input did not end before. */
TARGET_JPEG static int read_block(Bits *bits, const Huffman *dc, const Huffman *ac, int16_t *block, int *last_dc)
{
    Bits b = *bits; /* in registers */
    refill(&b);
    const Entry e = next_entry(dc, b.word);
    drop(&b, byte_of(e, 0));
    *last_dc += value_of(e, 0);
    block[0] = (int16_t)*last_dc;
    unsigned k = 1;
    do { /* 56 bits are enough for two calls, which consume at most 27 bits each (16 of code, 11 of value) */
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
